"""Every hazard has its tests, and `docs/hazards.md` says which."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hazards
import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hazards.md"


def test_every_test_that_is_named_is_there() -> None:
    assert not hazards.missing()
    assert all(tests for _, _, tests in hazards.HAZARDS)


def test_a_test_that_is_gone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = ("gate/test_verdict.py::test_that_never_was", "nowhere.py::test_clean_evidence_passes")
    monkeypatch.setattr(hazards, "HAZARDS", (("what", "answer", gone),))
    assert hazards.missing() == list(gone)


def test_the_page_is_what_the_table_says(golden: Callable[[Path, str], None]) -> None:
    golden(PAGE, hazards.page())
