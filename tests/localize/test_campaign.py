"""What the campaign counts, keeps and says: its tables can be believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime
import pytest

from surgery.export import choose_task
from surgery.runtimes import session
from tests.localize import outcomes
from tests.localize.conftest import Bases
from tests.localize.effects import effect
from tests.localize.outcomes import CLEAN, EDIT, Outcome, Store
from tests.localize.seeds import SEEDS, names
from tests.localize.tables import WHY, markdown, totals
from tests.localize.variants import Clean


def outcome(fault: str = "zero", kind: str = "weight", **fields: Any) -> Outcome:
    given = {"effect": 1e4, "verdict": "fail", "symptoms": ("conversion: wrong value",)}
    rest = {"model": "llama", "depth": 0, "sites": "o_proj", "named": "told"}
    return Outcome(kind=kind, fault=fault, **{**given, **rest, **fields})


CAUGHT = outcome(layer=True, module=True, operator=True, confirmed=True)
MISSED = outcome("stale", verdict="pass")
MISLED = outcome("8-bit", layer=True, module=False, operator=True, confirmed=True)
WEAK = outcome("one element", effect=0.5, verdict="pass")
ALARM = outcome("linked", CLEAN, effect=0.0)
UNNAMED = outcome("heads zeroed: half the edit", EDIT, as_such=False)


def test_there_are_at_least_forty_kinds_of_faults() -> None:
    assert len(list(names())) >= 60
    assert {fault for _, fault in names()} >= set(WHY)


def test_every_wrong_outcome_is_counted_and_listed() -> None:
    all_of_them = [CAUGHT, MISSED, MISLED, WEAK, ALARM, UNNAMED]
    found = totals(all_of_them)
    assert found["above 10 times the noise, caught"] == "2 of 3"
    assert found["localised: right module"] == "1 of 2"
    assert (found["at or below it"], found["false alarms"]) == ("1", "1")
    assert (found["wrong edits caught"], found["wrong edits named as such"]) == ("1 of 1", "0 of 1")
    listed = markdown(all_of_them).partition("## Not as it should be")[2].partition("## ")[0]
    for wrong in (MISSED, MISLED, ALARM, UNNAMED):
        assert f"| {wrong.fault} |" in listed
    for right in (CAUGHT, WEAK):
        assert f"| {right.fault} |" not in listed


def test_a_fault_below_the_bar_is_listed_with_its_effect_and_why() -> None:
    rows = markdown([CAUGHT, WEAK]).partition("## At or below")[2].partition("## Not")[0]
    assert "| llama | one element | 0 | 0.5 | pass | within the noise |" in rows
    assert "| zero |" not in rows


def test_a_run_goes_on_with_what_is_known(tmp_path: Path) -> None:
    store = Store(tmp_path, "llama with cache")
    store.begin([])
    store.add(CAUGHT)
    store.add(outcome("cut", effect=float("inf")))
    with next(tmp_path.iterdir()).open("a") as file:
        file.write('{"model": "llama", "ki')
    known = Store(tmp_path, "llama with cache").read()
    assert list(known.values()) == [CAUGHT, outcome("cut", effect=float("inf"))]


def test_outcomes_of_other_code_are_forgotten(tmp_path: Path) -> None:
    with patch.object(outcomes, "code_digest", return_value="older"):
        store = Store(tmp_path, "llama")
        store.begin([CAUGHT])
        assert store.read()
    assert Store(tmp_path, "llama").read() == {}


ONE = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({("a", "logits"): ONE}, 0.0),
        ({("a", "logits"): ONE + np.float32(0.5)}, 5.0),
        ({}, float("inf")),
        ({("a", "logits"): ONE[:1]}, float("inf")),
        ({("a", "logits"): ONE * np.float32("nan")}, float("inf")),
    ],
)
def test_an_effect_is_in_units_of_the_noise(
    found: dict[tuple[str, str], Any], expected: float
) -> None:
    clean = {("a", "logits"): ONE}
    assert effect(clean, found, {"logits": 0.1}) == pytest.approx(expected)


def test_seeds_have_names_of_their_own() -> None:
    listed = [fault for _, fault in names()]
    assert len(set(listed)) == len(listed) == sum(map(len, SEEDS.values()))


@pytest.mark.parametrize("level", ["DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED"])
def test_a_clean_variant_of_a_level_is_run_at_that_level(bases: Bases, level: str) -> None:
    base = bases("llama")
    task = choose_task(base.model, None)
    made = Clean(base.model, base.onnx, base.root, task).optimised(level)
    with made.entered():
        options = session.open_session(str(made.onnx), None, 1).get_session_options()
    wanted = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    assert options.graph_optimization_level == wanted
