"""An edited model whose conversion holds another edit: named by lineage, and without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from corners import Case
from differential import mutants
from differential.lab import Lab, finding, found, measured
from models import FAMILIES

from surgery.differential import Pair
from surgery.export import default_task
from surgery.export.lineage import trace
from surgery.gate import RHO_NAMES
from surgery.localize.edits import EditShares
from surgery.report import Report

Plant = Callable[..., Path]


def edited_names(case: Case) -> list[str]:
    """The tensors in which both ONNX files differ."""
    before, after = (onnx.load(str(path)) for path in (case.onnx, case.edited_onnx))
    names = [tensor.name.removesuffix(".T") for tensor in before.graph.initializer]
    return [n for n in names if (mutants.weight(before, n) != mutants.weight(after, n)).any()]


def apply_times(model: onnx.ModelProto, case: Case, times: float, names: list[str]) -> None:
    """The edited weights become original + `times` x the edit."""
    before, after = (onnx.load(str(path)) for path in (case.onnx, case.edited_onnx))
    for name in names:
        old, new = mutants.weight(before, name), mutants.weight(after, name)
        mutants.put(model, name, old + np.float32(times) * (new - old))


def hide(model: onnx.ModelProto, names: list[str]) -> None:
    """Rows in another order, put back by the graph, under names that no tensor has: lineage does
    not know what these weights should be."""
    for number, name in enumerate(names):
        mutants.reverse_rows(model, name, f"onnx::MatMul_{number}")


def assert_told(report: Report, what: str) -> None:
    """Lineage says of every tensor what became of the edit."""
    told = [f.message for f in report.findings if f.stage == "lineage"]
    assert told
    assert all(f": {what}; export" in message for message in told), told


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lost_edit_is_named_by_lineage_and_by_the_interaction(lab: Lab, family: str) -> None:
    """The edited ONNX file is the original's."""
    case = lab.case(family)
    report = lab.diff_edited(case, edited_onnx=case.onnx)
    prefix = "bert." if family == "bert" else ""
    stale = {f.site for f in report.findings if f.stage == "lineage"}
    assert stale == {f"R_e/{prefix}{name}" for name in edited_names(case)}
    assert_told(report, "the edit was lost")
    named = finding(report, "interaction", "the edit was lost")
    assert named.site == f"target/{default_task(case.model).output}"
    assert finding(report, "conversion", "wrong value").site.startswith("C_e/")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lost_edit_that_lineage_cannot_see_is_named_by_the_interaction(
    lab: Lab, plant: Plant, family: str
) -> None:
    case = lab.case(family)
    names = edited_names(case)
    path = plant(case.onnx, partial(hide, names=names))
    report = lab.diff_edited(case, edited_onnx=path)
    assert found(report) == {("conversion", "wrong value"), ("interaction", "the edit was lost")}
    assert [row.rho for row in report.evidence().interaction] == pytest.approx([-1] * 3, abs=1e-4)
    wrong = finding(report, "conversion", "wrong value")
    assert wrong.site.startswith("C_e/")
    assert "the conversion of the edited model is at fault" in wrong.message


@pytest.mark.parametrize(("times", "rho"), [(0.5, -0.5), (2.0, 1.0)])
@pytest.mark.parametrize("hidden", [False, True])
def test_an_edit_applied_half_or_twice_is_named(
    lab: Lab, plant: Plant, times: float, rho: float, hidden: bool
) -> None:
    case = lab.case("bert")
    names = edited_names(case)
    defects = [partial(apply_times, case=case, times=times, names=names)]
    if hidden:
        defects.append(partial(hide, names=names))
    report = lab.diff_edited(case, edited_onnx=plant(case.edited_onnx, *defects))
    named = finding(report, "interaction", RHO_NAMES[rho])
    assert named.site == "target/last_hidden_state"
    assert ("lineage" in {stage for stage, _ in found(report)}) is not hidden
    if not hidden:
        assert_told(report, RHO_NAMES[rho])


@pytest.mark.parametrize("times", [0.0, 0.3, 2.0, -1.0])
def test_the_share_of_an_edit_is_measured_in_each_tensor(
    lab: Lab, plant: Plant, times: float
) -> None:
    case = lab.case("bert")
    first, *others = edited_names(case)
    path = plant(case.edited_onnx, partial(apply_times, case=case, times=times, names=[first]))
    original, edited = Pair(case.model, case.onnx), Pair(case.edited, path)
    shares = EditShares(original, edited, trace(path, case.edited))
    held = {t.name.removesuffix(".T"): t.name for t in onnx.load(str(path)).graph.initializer}
    assert shares.share(held[first]) == pytest.approx(times, abs=1e-5)
    assert [shares.share(held[name]) for name in others] == [pytest.approx(1.0)] * len(others)
    changed = plant(path, partial(mutants.change, name=first, how=np.flip))
    damaged = EditShares(original, Pair(case.edited, changed), trace(changed, case.edited))
    assert damaged.share(held[first]) is None


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("times", [0.5, 2.0])
def test_where_the_effect_is_far_from_linear_it_is_named_all_the_same(
    lab: Lab, plant: Plant, family: str, times: float
) -> None:
    """Twice an edit this large does not have twice its effect: rho is then between the names, and
    the graph is held to the model that has twice the edit."""
    case = lab.case(family)
    names = edited_names(case)
    change = partial(apply_times, case=case, times=times, names=names)
    path = plant(case.edited_onnx, change, partial(hide, names=names))
    report = lab.diff_edited(case, edited_onnx=path)
    stages = {f.stage for f in measured(report)}
    assert (report.verdict, stages) == ("fail", {"conversion", "interaction"})
    assert finding(report, "interaction", RHO_NAMES[times - 1])


def test_one_stale_tensor_among_the_edited_is_named_and_no_other(lab: Lab, plant: Plant) -> None:
    case = lab.case("llama")
    name = edited_names(case)[2]
    change = partial(apply_times, case=case, times=0.0, names=[name])
    report = lab.diff_edited(case, edited_onnx=plant(case.edited_onnx, change))
    stale = [f.site for f in report.findings if f.stage == "lineage"]
    assert stale == [f"R_e/{name}"]
    assert_told(report, "the edit was lost")
    assert finding(report, "conversion", "wrong value").site.startswith("C_e/")


def test_a_defect_of_the_converter_is_blamed_on_the_converter(lab: Lab, plant: Plant) -> None:
    """The same defect in both files: C_o as bad as C_e, and hardly any interaction."""
    case = lab.case("llama")
    scale = partial(mutants.scale_epsilons, factor=2.0)
    original, edited = (plant(path, scale) for path in (case.onnx, case.edited_onnx))
    report = lab.diff_edited(case, onnx=original, edited_onnx=edited)
    wrong = [f for f in report.findings if f.stage == "conversion"]
    assert [f.site.partition("/")[0] for f in wrong] == ["C_o", "C_e"]
    assert all("the converter is at fault, with or without the edit" in f.message for f in wrong)
    assert not any(f.stage == "interaction" for f in report.findings)


def test_onnx_files_of_original_and_edited_swapped_fail(lab: Lab) -> None:
    case = lab.case("gpt2")
    report = lab.diff_edited(case, onnx=case.edited_onnx, edited_onnx=case.onnx)
    assert {f.site[:3] for f in report.findings if f.stage == "lineage"} == {"R_o", "R_e"}
    assert [row.rho for row in report.evidence().interaction] == pytest.approx([-2] * 3, abs=1e-4)
