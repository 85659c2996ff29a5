"""Rounds: what is certain stops the rest, a budget is spent, and all of it can be repeated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from differential import mutants
from differential.lab import Lab, finding, found

from surgery.differential import rounds
from surgery.errors import StimuliError
from surgery.policy import Policy
from surgery.report import Report
from surgery.runtimes.child import Outcome

Plant = Callable[..., Path]
SHORT = {f"probe/batch {title}" for title in ("1, length 1", "3, holes", "3, left padding")}


@pytest.fixture
def long_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest would always take long."""
    monkeypatch.setattr(rounds, "REST_FLOPS", 1.0)


def ran(report: Report) -> set[str]:
    named = report.inputs["workload"]["batch_sha256"]
    assert isinstance(named, dict)
    return set(named)


def left_out(report: Report) -> dict[str, Any]:
    named = report.inputs["workload"].get("left_out", {})
    assert isinstance(named, dict)
    return named


# ---------------------------------------------------------------------------------- first look


@pytest.mark.usefixtures("long_rest")
def test_two_rounds_come_to_what_one_comes_to(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    case = lab.case("llama")
    two = lab.diff_edited(case)
    monkeypatch.undo()
    one = lab.diff_edited(case)
    assert one.verdict == two.verdict == "pass"
    for field in ("conversion", "interaction", "effects", "drift", "covered_rows", "inputs"):
        assert getattr(one, field) == getattr(two, field), field


@pytest.mark.usefixtures("long_rest")
def test_nothing_more_runs_once_a_fault_is_certain(lab: Lab, plant: Plant) -> None:
    case = lab.case("llama")
    report = lab.diff(case, onnx=plant(case.onnx, mutants.nan_everywhere))
    assert finding(report, "run", "nan").site.startswith("R_o/logits/probe/")
    assert ran(report) >= SHORT
    assert set(left_out(report)) == {"target/0", "preserve/0"}
    assert all("a fault is certain: R_o: " in why for why in left_out(report).values())


@pytest.mark.usefixtures("long_rest")
def test_an_error_is_certain_from_a_thousand_limits_on(lab: Lab, plant: Plant) -> None:
    case = lab.case("llama")
    noise = lab.diff(case).evidence().conversion[0].noise_max
    for times, certain in ((100, False), (1e6, True)):
        off = partial(mutants.add, values=np.full(200, times * noise))
        report = lab.diff(case, onnx=plant(case.onnx, off))
        assert found(report) == {("conversion", "wrong value")}
        assert bool(left_out(report)) is certain


@pytest.mark.usefixtures("long_rest")
def test_what_a_rule_of_the_policy_judges_still_runs(lab: Lab, plant: Plant) -> None:
    case = lab.case("llama")
    rule: dict[str, Any] = {"schema": 1, "preserve": {"max_kl": 10.0}}
    policy = Policy.model_validate(rule)
    report = lab.diff_edited(case, onnx=plant(case.onnx, mutants.nan_everywhere), policy=policy)
    assert set(left_out(report)) == {"target/0"}
    assert ("preserve", "not measured") not in found(report)
    assert {drift.stimulus_set for drift in report.drift} == {"preserve", "probe"}


def test_a_short_workload_is_run_at_once(lab: Lab, plant: Plant) -> None:
    case = lab.case("llama")
    report = lab.diff(case, onnx=plant(case.onnx, mutants.nan_everywhere))
    assert not left_out(report)


# -------------------------------------------------------------------------------------- budget


def outcome(seconds: float, busy: float) -> Outcome:
    return Outcome("ok", "", seconds, 1, 1, Path(), result={"busy": busy})


def test_the_time_left_pays_for_loading_every_model_again() -> None:
    outcomes = [outcome(5.0, 1.0), outcome(11.0, 3.0)]
    assert rounds.affordable(outcomes, 400, 12.0) == 0
    assert rounds.affordable(outcomes, 400, 12.0 + 2.0) == 200


def test_a_budget_without_room_says_so(lab: Lab) -> None:
    report = lab.diff(lab.case("llama"), budget=1e-6)
    assert report.verdict == "pass"
    assert "no time for another round" in left_out(report)[rounds.BUDGET]


def test_what_a_budget_leaves_goes_where_the_error_is(
    lab: Lab, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of some limits at holes alone: every other further probe has that shape."""
    monkeypatch.setattr(rounds, "affordable", lambda *given: 300)
    monkeypatch.setattr(rounds, "CERTAIN", 1e30)
    case = lab.case("llama")
    report = lab.diff(case, onnx=plant(case.onnx, mutants.fill_holes), budget=100.0)
    extra = {name for name in ran(report) if name.startswith("probe/extra ")}
    alike = {name for name in extra if name.endswith(", as probe/batch 3, holes")}
    assert len(alike) in (len(extra) // 2, (len(extra) + 1) // 2) and alike


def test_no_budget_is_spent_on_what_is_certain(lab: Lab, plant: Plant) -> None:
    case = lab.case("llama")
    report = lab.diff(case, onnx=plant(case.onnx, mutants.nan_everywhere), budget=1e6)
    assert "a fault is certain" in left_out(report)[rounds.BUDGET]


# ------------------------------------------------------------------------------- one batch again


def test_a_finding_is_run_again_by_the_row_it_names(lab: Lab, plant: Plant) -> None:
    case = lab.case("llama")
    onnx = plant(case.onnx, mutants.fill_holes)
    first = finding(lab.diff(case, onnx=onnx), "conversion", "wrong value")
    row = first.site.split("/", 2)[2].rpartition(" @ ")[0]
    again = lab.diff(case, onnx=onnx, batch=row)
    assert ran(again) == {"probe/batch 3, holes"}
    alone = finding(again, "conversion", "wrong value")
    assert alone.site == first.site
    assert alone.value == pytest.approx(first.value, rel=0.5), "noise is that of the batch"


def test_a_batch_alone_has_its_numbers_and_is_no_pass(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "affordable", lambda *given: 100)
    case = lab.case("llama")
    whole = lab.diff(case, budget=100.0)
    digests = whole.inputs["workload"]["batch_sha256"]
    assert isinstance(digests, dict)
    for name in ("target/0", *(name for name in digests if "extra" in name)):
        alone = lab.diff(case, batch=name)
        assert alone.inputs["workload"]["batch_sha256"] == {name: digests[name]}
        assert found(alone) == {("coverage", "not measured")}


def test_a_batch_that_is_none_is_refused(lab: Lab) -> None:
    with pytest.raises(StimuliError, match="did you mean 'probe/batch 3, holes'"):
        lab.diff(lab.case("llama"), batch="probe/batch 3, hole")
    with pytest.raises(StimuliError, match="there is no batch"):
        lab.diff(lab.case("llama"), batch="probe/extra 3, as nothing")
