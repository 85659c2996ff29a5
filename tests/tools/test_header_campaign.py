"""Damaged headers: nothing gets past the reader, and a reader that lets something by is caught."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgery.checkpoint import files, header
from surgery.errors import CheckpointError

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from header_files import MUTATIONS, HeaderFile, judge  # noqa: E402

FIXTURES = TOOLS.parent / "fixtures"


def campaign(*options: str) -> str:
    argv = [sys.executable, str(TOOLS / "mutate_headers.py"), *options]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_mutated_headers_are_refused_or_rightly_read() -> None:
    printed = campaign("--count", "400", "--command-every", "0")
    assert "0 x crash, 0 x wrong accept, 0 x traceback, 0 x message" in printed


@pytest.mark.campaign
def test_five_thousand_mutated_headers() -> None:
    printed = campaign("--count", "5000", "--command-every", "25")
    assert "0 x crash, 0 x wrong accept, 0 x traceback, 0 x message" in printed


def caught(count: int = 600) -> set[str]:
    """Laws broken over `count` mutations by the reader as it is now."""
    rng, broken = random.Random(0), set()  # noqa: S311
    originals = [HeaderFile.read(path) for path in sorted(FIXTURES.glob("*/model*.safetensors"))]
    for _ in range(count):
        kind = rng.choice(list(MUTATIONS))
        file = MUTATIONS[kind](rng.choice(originals), rng)
        try:
            judge(header.read_header, CheckpointError, file)
        except Exception as error:
            broken.add(f"{type(error).__name__}: {str(error).split(':')[0]}")
    return broken


def test_the_reader_breaks_no_law() -> None:
    assert caught() == set()


def _lax_pairs(raw: bytes, source: str, parse_int: Callable[[str], Any] = int) -> dict[str, Any]:
    try:
        return dict(json.loads(raw, parse_int=parse_int))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: {files.quote(error)}") from None


@pytest.mark.parametrize(
    ("name", "lax"),
    [
        ("parse_json_object", _lax_pairs),
        ("_check_tiling", lambda *_: None),
        ("_check_extent", lambda *_: None),
        ("_naturals", lambda value: isinstance(value, list)),
    ],
)
def test_a_lax_reader_is_caught(name: str, lax: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, name, lax)
    assert caught()
