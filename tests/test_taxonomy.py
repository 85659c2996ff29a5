"""Every finding has a class of the study, and a fingerprint that stays where the fault stays."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.evidence import Finding
from surgery.export.lineage import diagnosis
from surgery.gate import RHO_NAMES
from surgery.gate.words import IMPOSSIBLE
from surgery.localize.edit import CHANGED
from surgery.taxonomy import (
    STAGES,
    SYMPTOMS,
    Cause,
    Stage,
    Symptom,
    classify,
    fingerprint,
    issues,
)

SPOKEN = {
    "fault.stage": {"capture", "translate", "optimise", "kernel", "interface", "run"},
    "_stage(drift.stimulus_set)": {"preserve", "target"},
    "fault.symptom": set(diagnosis.SYMPTOMS),
    "corner.status": {"crash", "timeout", "error"},
    "outcome.status": {"crash", "timeout", "error"},
    "_symptom(bad)": {"nan", IMPOSSIBLE},
    "_symptom({name: drifted})": {"nan", IMPOSSIBLE},
    "RHO_NAMES[rho]": set(RHO_NAMES.values()),
    "named": {*RHO_NAMES.values(), CHANGED, "wrong value"},
    "name or 'wrong value'": {*RHO_NAMES.values(), "wrong value"},
    "kind": {"introduced error"},
    "stage": {"conversion", "interaction", "preserve", "target"},
    "symptom": {"shape", "missing output", "dtype", "nan"},
}
"""What the code says in other than plain words."""


def words(place: int) -> Iterator[str]:
    """The words that the code gives findings as stage (0) or symptom (1)."""
    for file in Path(surgery.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Finding":
                given = node.args[place]
                yield from _meant(given, file)


def _meant(given: ast.expr, file: Path) -> Iterable[str]:
    """The words that an expression in a file can be."""
    if isinstance(given, ast.Constant):
        return [str(given.value)]
    spoken = ast.unparse(given)
    if spoken.isupper():
        parts = file.relative_to(Path(surgery.__file__).parents[1]).with_suffix("").parts
        return [getattr(importlib.import_module(".".join(parts)), spoken)]
    return SPOKEN[spoken]


def test_every_word_the_code_can_say_has_a_class() -> None:
    assert len(set(words(0))) > 10 and len(set(words(1))) > 30
    assert set(words(0)) <= set(STAGES)
    assert set(words(1)) <= set(SYMPTOMS)


def test_no_class_is_of_a_word_that_nobody_says() -> None:
    assert set(SYMPTOMS) == set(words(1))
    assert set(STAGES) - {"load"} == set(words(0))


def test_a_word_that_is_none_of_ours_is_told_as_such() -> None:
    found = classify(Finding("weather", "rain", "here", "it rains"))
    assert found == (Stage.UNKNOWN, Symptom.UNREPORTED, Cause.UNKNOWN)


@pytest.mark.parametrize(
    ("operator", "cause"),
    [
        ("Cast, which a fresh graph has not", Cause.TYPE),
        ("Transpose, whose perm is [0, 2], in a fresh graph [0, 1]", Cause.SHAPE),
        ("Softmax, whose axis is -2, in a fresh graph -1", Cause.ALGORITHM),
        ("Cast, whose weight is not 'h.0.w'", Cause.ALGORITHM),
        ("", Cause.UNKNOWN),
    ],
)
def test_a_localised_operator_says_the_cause(operator: str, cause: Cause) -> None:
    finding = Finding("translate", "introduced error", "R_o/o_proj.0", "m", operator=operator)
    assert classify(finding) == (Stage.NODES, Symptom.WRONG_MODEL, cause)


def introduced(corner: str, layer: int, value: float, words: str = "Softmax, axis -2") -> Finding:
    site = f"{corner}/o_proj.{layer} input"
    return Finding("translate", "introduced error", site, f"{value}", value, 8.0, words)


places = st.tuples(
    st.sampled_from(["R_o", "R_e"]), st.integers(0, 200), st.floats(8, 1e12, allow_nan=False)
)


@given(places, places)
def test_layer_corner_and_magnitude_do_not_change_a_fingerprint(
    one: tuple[str, int, float], other: tuple[str, int, float]
) -> None:
    assert fingerprint(introduced(*one)) == fingerprint(introduced(*other))


def test_what_is_another_fault_has_another_fingerprint() -> None:
    own = introduced("R_o", 0, 9.0)
    others = [
        replace(own, operator="Cast"),
        replace(own, stage="optimise"),
        replace(own, site="R_o/down_proj.0 input"),
        replace(own, symptom="wrong value"),
        replace(own, operator=""),
    ]
    assert len({fingerprint(finding) for finding in (own, *others)}) == 6


def test_the_batch_that_was_first_to_show_it_does_not_matter() -> None:
    one = Finding("interface", "shape", "R_o/logits/batch 1, length 1", "m")
    other = Finding("interface", "shape", "R_e/logits/target/3", "m")
    assert fingerprint(one) == fingerprint(other)


def test_one_fault_twice_is_one_issue_with_both_its_sites() -> None:
    found = issues(
        [introduced("R_o", 0, 9.0), Finding("run", "nan", "R_o/x", "m"), introduced("R_e", 3, 1e9)]
    )
    assert [issue.count for issue in found] == [2, 1]
    assert found[0].sites == ("R_o/o_proj.0 input", "R_e/o_proj.3 input")
    assert (found[0].stage, found[0].cause) == ("node conversion", "algorithmic error")


@given(st.lists(st.builds(introduced, st.just("R_o"), st.integers(0, 9), st.floats(8, 99))))
def test_issues_count_every_finding_once(findings: list[Finding]) -> None:
    assert sum(issue.count for issue in issues(findings)) == len(findings)
