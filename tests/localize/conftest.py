from __future__ import annotations

from pathlib import Path

import pytest
from corners import Here

from tests.localize.campaign import Base


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
