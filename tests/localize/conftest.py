from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from corners import Here

from tests.localize.campaign import Base
from tests.models import Zoo, shared_zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return shared_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session", autouse=True)
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Captured graphs are cached for the session alone, unless it says where."""
    folder = os.environ.get("SURGERY_CACHE") or str(tmp_path_factory.mktemp("cache"))
    with patch.dict(os.environ, {"SURGERY_CACHE": folder}):
        yield


class Bases:
    """Models to plant in, each made when a test first asks for it."""

    def __init__(self, root: Path) -> None:
        self._root, self._here = root, Here(root / "cache")
        self._made: dict[str, Base] = {}

    def __call__(self, name: str) -> Base:
        if name not in self._made:
            self._made[name] = Base.make(name, self._root, self._here, layers=2)
        return self._made[name]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))
