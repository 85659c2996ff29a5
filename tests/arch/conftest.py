"""Every entry of `MODELS`, live and as a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from live import Live
from models import MODELS


@pytest.fixture(params=MODELS)
def live(request: pytest.FixtureRequest, base_of: Callable[..., Path], tmp_path: Path) -> Live:
    return Live(request.param, base_of(request.param), tmp_path)
