from __future__ import annotations

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest

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
