"""Shared fixtures and options."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.models import Zoo

# Helpers of the tests (`evidences`, `models`) are plain modules beside this file.
sys.path.insert(0, str(Path(__file__).parent))

# Time limits would fail on a busy machine; the same examples on every run.
settings.register_profile("surgery", deadline=None, derandomize=True)
settings.load_profile("surgery")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite what is kept")


LONGEST = ("test_readme.py", "test_demo.py", "test_families.py", "test_validate.py")
"""Files of few tests that run whole commands."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str | Path, str], None]:
    """`golden(name, text)`: the text is the one kept in `tests/golden/name`, or at a whole path."""

    def check(name: str | Path, text: str) -> None:
        kept = GOLDEN / name
        if request.config.getoption("--update-golden"):
            kept.write_text(text, encoding="utf-8")
        assert text == kept.read_text(encoding="utf-8")

    return check


@pytest.fixture(scope="session", autouse=True)
def graph_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Graphs are captured once in a session, whichever worker asks first; never the user's own."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if hasattr(request.config, "workerinput") else root) / "surgery-cache"
    with patch.dict(os.environ, {"SURGERY_CACHE": str(folder)}):
        yield folder


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Random models and their exports, each made once, when a test first asks for it."""
    from tests.models import shared_zoo

    return shared_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`base_of(family, dtype="float32", **config)`: a saved random model, made once; read only."""
    from models import make

    made: dict[str, Path] = {}

    def base(family: str, dtype: str = "float32", **config: object) -> Path:
        key = repr((family, dtype, sorted(config.items())))
        if key not in made:
            made[key] = make(
                family, tmp_path_factory.mktemp(family) / "base", dtype=dtype, **config
            )
        return made[key]

    return base
