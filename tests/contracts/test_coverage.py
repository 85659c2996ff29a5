"""`docs/coverage.md` is what the cases give, and leaves nothing unsaid."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from cases import CASES
from coverage_tables import FAMILIES, coverage, verdicts

from surgery.arch import FAMILIES as DESCRIBED

KEPT = Path(__file__).parents[2] / "docs" / "coverage.md"


def test_the_file_is_what_the_cases_give(golden: Callable[[str | Path, str], None]) -> None:
    golden(KEPT, coverage())


def test_every_cell_of_every_family_is_proven_or_refused_with_a_reason() -> None:
    assert set(FAMILIES) == set(DESCRIBED)
    text = KEPT.read_text(encoding="utf-8")
    reasons = re.findall(r"(?m)^(\d+)\. \S", text)
    families = text[: text.index("## Where")]
    rows = [line.split(" | ") for line in families.splitlines() if line.startswith("| `")]
    assert {row[0].removeprefix("| ") for row in rows} == {case.way for case in CASES}
    for row in rows:
        assert len(row) == 1 + len(FAMILIES)
        for cell in row[1:]:
            said = re.fullmatch(r"(proven|approximate|refused(?= \[))((?: \[\d+\])*)(?: \|)?", cell)
            assert said, cell
            assert set(re.findall(r"\d+", said[2])) <= set(reasons)


def test_at_least_two_hundred_cells_are_proven() -> None:
    assert sum(verdicts(model).count("proven") for model in FAMILIES) >= 200
