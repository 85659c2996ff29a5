"""What corners report about themselves becomes a fault, also where no number is compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from surgery.differential.compare import compare
from surgery.differential.corners import Ran
from surgery.differential.workload import Workload
from surgery.evidence import Evidence
from surgery.export import find_task
from surgery.gate import judge
from surgery.policy import BUILT_IN
from surgery.runtimes.child import Outcome
from surgery.stimuli.extra import Space

NOTHING = Workload((), (), (), (), (), None, Space(0, 0, late=True, cache=False, seed=0))
ANSWER = {
    "batches": [],
    "generations": [],
    "continuations": [],
    "embedding_problem": "none asked for",
}


def outcome(status: str = "ok", **answer: Any) -> Outcome:
    return Outcome(status, "why", 1.0, 1, 1, Path(), result={**ANSWER, **answer})


def evidence(corners: dict[str, Outcome], references: dict[str, Outcome]) -> Evidence:
    return compare(Ran(corners, references), NOTHING, find_task("causal-lm"))


def test_a_response_cut_short_by_nan_is_a_fault() -> None:
    cut = outcome(generations=[{"tokens": [[5], []], "nonfinite": 1, "runners": [[], []]}])
    workload = replace(NOTHING, responders=(("a", "b"),))
    [fault] = compare(Ran({"R_o": cut}, {}), workload, find_task("causal-lm")).faults
    assert (fault.stage, fault.symptom, fault.site) == ("run", "nan", "R_o/generation")


@pytest.mark.parametrize("status", ["crash", "timeout", "error"])
def test_a_corner_or_a_reference_that_does_not_end_well_fails(status: str) -> None:
    """Without the float64 reference there is no yardstick."""
    corner = evidence({"T_o": outcome(), "R_o": outcome(status)}, {"T_o": outcome()})
    reference = evidence({"T_o": outcome(), "R_o": outcome()}, {"T_o": outcome(status)})
    for found, site in ((corner, "R_o"), (reference, "T_o in float64")):
        verdict = judge(found, BUILT_IN)
        named = {(f.stage, f.symptom, f.site) for f in verdict.findings}
        assert (verdict.verdict, ("run", status, site) in named) == ("fail", True)


def test_nothing_compared_is_no_pass() -> None:
    clean = evidence({"T_o": outcome(), "R_o": outcome()}, {"T_o": outcome()})
    assert clean.compared == 0
    assert judge(clean, BUILT_IN).verdict != "pass"
