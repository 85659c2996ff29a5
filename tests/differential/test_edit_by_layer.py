"""An edit lost, halved or doubled in one module of one layer is named there, and nowhere else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from corners import Case
from differential.lab import Lab
from differential.mutants import change
from differential.test_lost_edits import Plant, apply_times, edited_names, hide

from surgery import pipeline
from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.differential import Pair
from surgery.export import default_task
from surgery.export.lineage import trace
from surgery.localize.edit import SURVIVED, EditTrace, trace_edit
from surgery.pipeline import causes
from surgery.report import render
from surgery.stimuli.batches import pad

FAMILIES = ["gpt2", "llama", "bert"]
WORDS = {0.0: "the edit was lost", 0.5: "half lost", 2.0: "applied twice"}


def traced(lab: Lab, case: Case, edited_onnx: Path, scratch: Path) -> EditTrace:
    pairs = {"C_o": Pair(case.model, case.onnx), "C_e": Pair(case.edited, edited_onnx)}
    batch = pad("b", "target", [(7, 8, 9, 10, 11), (15, 16)], "left", ("one", "two"))
    with lab.here.installed():
        lineages = {edge: trace(pair.onnx, pair.model) for edge, pair in pairs.items()}
        return trace_edit(pairs, default_task(case.model), batch, lineages, scratch)


def site_of(case: Case, tensor: str) -> tuple[str, int | None]:
    """Where a weight's module gives its output, and its layer."""
    roles = identify(Checkpoint.open(case.edited)).roles
    role = next(role for name, role in roles.items() if name.endswith(tensor))
    return f"{role.role}.{role.layer}", role.layer


def hidden(case: Case, name: str, times: float) -> tuple[Any, Any]:
    """One tensor's edit `times` over, where lineage cannot see it."""
    change = partial(apply_times, case=case, times=times, names=[name])
    return change, partial(hide, names=[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clean_edit_survives_wherever_it_acts(lab: Lab, family: str, tmp_path: Path) -> None:
    case = lab.case(family)
    found = traced(lab, case, case.edited_onnx, tmp_path)
    assert found.clean
    acting = {row.site for row in found.rows if row.word}
    assert acting == {site_of(case, name)[0] for name in edited_names(case)}
    assert {row.word for row in found.rows} == {SURVIVED, ""}
    assert max(row.ratio for row in found.rows) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("times", "number"), [(0.0, 2), (0.5, 3), (2.0, 0)])
def test_an_edit_that_goes_wrong_in_one_module_is_named_there(
    lab: Lab, plant: Plant, family: str, times: float, number: int, tmp_path: Path
) -> None:
    """Hidden from lineage, and with every other module's edit in its place."""
    case = lab.case(family)
    name = edited_names(case)[number]
    defects = (
        partial(apply_times, case=case, times=times, names=[name]),
        partial(hide, names=[name]),
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = traced(lab, case, plant(case.edited_onnx, *defects), scratch)
    site, layer = site_of(case, name)
    (wrong,) = found.wrong
    assert (wrong.site, wrong.layer, wrong.word) == (site, layer, WORDS[times])
    assert wrong.own_rho == pytest.approx(times - 1, abs=1e-4)
    others = {site_of(case, other)[0] for other in edited_names(case)} - {site}
    assert {row.site for row in found.rows if row.word == SURVIVED} == others
    assert f"{WORDS[times]} at {site} (layer {layer})" in str(found)


def test_what_goes_wrong_where_the_edit_does_nothing_has_no_word(
    lab: Lab, plant: Plant, tmp_path: Path
) -> None:
    """A weight that no edit touches, wrong in the edited model's file alone."""
    case = lab.case("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    path = plant(case.edited_onnx, partial(change, name=name, how=lambda values: values * 1.01))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = traced(lab, case, path, scratch)
    (wrong,) = found.wrong
    assert (wrong.site, wrong.word) == ("up_proj.1", "")
    assert "does nothing beyond noise" in str(found)


def test_a_report_names_the_layer_and_the_worst_stimuli(lab: Lab, plant: Plant) -> None:
    case = lab.case("gpt2")
    name = edited_names(case)[2]
    defects = (
        partial(apply_times, case=case, times=0.0, names=[name]),
        partial(hide, names=[name]),
    )
    report = lab.diff_edited(case, edited_onnx=plant(case.edited_onnx, *defects))
    (told,) = (f for f in report.findings if f.stage == "localize")
    assert (told.symptom, told.site) == ("the edit was lost", "R_e/o_proj.1")
    assert told.message.startswith("the edit was lost at o_proj.1 (layer 1)")
    for stimulus_set in ("target", "preserve", "probe"):
        ratios = [row.noise_ratio for row in report.stimuli if row.stimulus_set == stimulus_set]
        assert 0 < len(ratios) <= 10 and ratios == sorted(ratios, reverse=True)
    text = render(report, "text")
    assert "Interaction by layer" in text and "Interaction by stimulus" in text
    rows = text.partition("Interaction by stimulus")[2].partition("Interaction by layer")[0]
    assert len(rows.strip().splitlines()) == 2 + 10


def test_sums_over_the_stimuli_of_a_set_are_those_of_the_set(lab: Lab) -> None:
    """‖E‖² adds up: every stimulus is counted once."""
    report = lab.diff_edited(lab.case("gpt2"))
    (whole,) = (row for row in report.interaction if row.stimulus_set == "target")
    parts = [row.effect**2 for row in report.stimuli if row.stimulus_set == "target"]
    assert len(parts) == 3 and sum(parts) == pytest.approx(whole.effect**2)
    assert not report.sites


def test_on_request_the_edit_is_traced_where_nothing_is_wrong(lab: Lab) -> None:
    case = lab.case("gpt2")
    given = {"onnx": case.onnx, "edited": case.edited, "edited_onnx": case.edited_onnx}
    with lab.here.installed():
        found = pipeline.localize(case.model, **given, stimuli=[lab.stimuli])
    assert found["C_o"].edit is None
    edit = found["C_e"].edit
    assert edit is not None and edit.clean and found["C_e"].clean


def test_a_trace_that_fails_is_a_finding_and_never_clean(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ValueError("bug")

    monkeypatch.setattr(causes, "trace_edit", fail)
    case = lab.case("gpt2")
    report = lab.diff_edited(case, edited_onnx=case.onnx)
    told = [f for f in report.findings if f.stage == "localize" and "bug" in f.message]
    assert [f.symptom for f in told] == ["not found"]
    assert not EditTrace((), "batch").clean
