"""Noise beyond its size: the shape of an error, the type a graph computes in, A/A runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from differential import mutants
from differential.conftest import Plant
from differential.lab import Lab, finding, found
from here import in_this_process

from surgery.differential import repeats
from surgery.policy import BUILT_IN, ConversionPolicy, Policy
from surgery.report import Report
from surgery.runtimes.child import default_threads
from surgery.runtimes.interface import ModelRef
from surgery.runtimes.precision import compute_dtype

FAMILIES = ("llama", "bert")


def ratios(report: Report) -> list[float]:
    rows = report.conversion
    return [r for row in rows for r in (row.ratio_max, row.ratio_l2, row.ratio_position)]


# --------------------------------------------------------------------------------------- shape


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bias_that_every_ratio_lets_pass_is_another_distribution(
    lab: Lab, plant: Plant, family: str
) -> None:
    """Twice the noise's sigma added to every element: less than a clean run's worst element."""
    case = lab.case(family)
    [clean] = lab.diff(case).conversion
    bias = 2 * clean.noise_l2 / np.sqrt(clean.elements)
    biased = lab.diff(case, onnx=plant(case.onnx, partial(mutants.add, values=np.array(bias))))
    assert max(ratios(biased)) < BUILT_IN.conversion.max_noise_ratio / 2
    assert found(biased) == {("conversion", "wrong distribution")}
    assert biased.shapes[0].error_mean > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clean_error_is_distributed_as_the_noise_is(lab: Lab, family: str) -> None:
    report = lab.diff(lab.case(family))
    [shape] = report.shapes
    assert (shape.dtype, shape.elements) == ("float32", report.conversion[0].elements)
    assert shape.overlap > 0.98
    assert shape.sigma_ratio < 1.3
    assert abs(shape.noise_mean) < 0.2 and abs(shape.error_mean) < 0.2


def test_a_preset_is_judged_beside_the_built_in_rules(lab: Lab) -> None:
    case = lab.case("llama")
    passing, failing = (
        Policy(schema=1, conversion=ConversionPolicy.model_validate({"preset": name}))
        for name in ("issta-notebook", "issta-text")
    )
    assert lab.diff(case, policy=passing).verdict == "pass"
    report = lab.diff(case, policy=failing)
    assert found(report) == {("tolerance", "beyond a fixed tolerance")}
    [row] = report.tolerances
    assert row.outside["issta-text"] > 0 and row.atol > 1e-7


def test_the_least_tolerance_is_what_the_outputs_need(lab: Lab) -> None:
    report = lab.diff(lab.case("llama"))
    [row], [conversion] = report.tolerances, report.conversion
    assert row.atol == pytest.approx(conversion.max_abs, rel=1e-12)
    assert 0 < row.both < row.atol < row.rtol


# ------------------------------------------------------------------------------------- float16


@pytest.fixture(scope="module")
def half(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama of the lab, exported in float16."""
    from surgery.export import export

    folder = tmp_path_factory.mktemp("half") / "onnx"
    with in_this_process():
        return export(lab.case("llama").model, folder, dtype="float16").model


def test_a_float16_graph_is_held_to_float16_noise(lab: Lab, half: Path) -> None:
    case = lab.case("llama")
    report = lab.diff(case, onnx=half)
    assert (report.verdict, list(report.findings)) == ("pass", [])
    [shape] = report.shapes
    assert shape.dtype == "float16"
    assert max(ratios(report)) < 2
    [narrow], [wide] = report.conversion, lab.diff(case).conversion
    assert narrow.noise_l2 > 100 * wide.noise_l2


def test_a_defect_of_a_float16_graph_is_told_in_float16_noise(
    lab: Lab, plant: Plant, half: Path
) -> None:
    zero = partial(mutants.zero_row, name="model.layers.1.mlp.up_proj.weight", row=3)
    report = lab.diff(lab.case("llama"), onnx=plant(half, zero))
    assert "times float16 noise away" in finding(report, "conversion", "wrong value").message
    [cause] = [f for f in report.findings if f.symptom == "introduced error"]
    assert cause.site == "R_o/up_proj.1"


def test_a_float32_graph_whose_output_was_rounded_is_held_to_float32(
    lab: Lab, plant: Plant
) -> None:
    case = lab.case("llama")
    report = lab.diff(case, onnx=plant(case.onnx, mutants.through_float16))
    assert report.shapes[0].dtype == "float32"
    assert ("conversion", "wrong value") in found(report)


def test_the_type_of_most_weights_is_the_graphs() -> None:
    def graph(*widths: tuple[int, int]) -> onnx.ModelProto:
        """Products of one row with weights [8, width], each of an element type."""
        nodes, weights = [], []
        for number, (kind, width) in enumerate(widths):
            name = f"w{number}"
            weights.append(onnx.helper.make_tensor(name, kind, (8, width), [0.0] * 8 * width))
            nodes.append(onnx.helper.make_node("MatMul", [f"x{number}", name], [f"y{number}"]))
        made = onnx.helper.make_graph(nodes, "g", [], [], weights)
        return onnx.helper.make_model(made)

    wide, narrow = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    assert compute_dtype(graph()) == "float32"
    assert compute_dtype(graph((narrow, 64), (wide, 1))) == "float16"
    assert compute_dtype(graph((narrow, 1), (wide, 64))) == "float32"
    assert compute_dtype(graph((narrow, 8), (wide, 8))) == "float32"
    assert compute_dtype(graph((onnx.TensorProto.BFLOAT16, 8))) == "bfloat16"


def test_weights_cast_before_they_are_multiplied_are_of_the_type_they_are_cast_to(
    lab: Lab,
) -> None:
    """bfloat16 on disk, float32 in every product."""
    assert lab.diff(lab.case("llama", "bfloat16")).shapes[0].dtype == "float32"


# ------------------------------------------------------------------------------------- A/A runs


def test_a_model_run_again_is_told_beside_its_noise(lab: Lab) -> None:
    report = lab.diff(lab.case("llama"), aa=True)
    assert (report.verdict, list(report.findings)) == ("pass", [])
    threads = "1 thread" if default_threads() > 1 else "2 threads"
    narrow = [f"{how} in {d}" for d in ("bfloat16", "float16") for how in ("stored", "computed")]
    levels = [f"optimisation {level}" for level in ("disabled", "basic", "extended")]
    rows = {(row.corner, row.variant): row for row in report.repeats}
    assert set(rows) == {
        *(("T_o", name) for name in (threads, "attention eager", *narrow)),
        *(("R_o", name) for name in (threads, *levels)),
    }
    assert {row.positions for row in rows.values()} == {report.conversion[0].positions}
    assert 0 < rows["T_o", "attention eager"].ratio_l2 < 2
    assert 0 < rows["R_o", "optimisation disabled"].ratio_l2 < 2
    bf16, f16 = (rows["T_o", f"computed in {name}"] for name in ("bfloat16", "float16"))
    assert bf16.l2 > 4 * f16.l2 > 1000 * rows["T_o", "attention eager"].l2


def variant(lab: Lab, monkeypatch: pytest.MonkeyPatch, onnx_file: Path, kind: str) -> Report:
    """The A/A run of a clean graph in which another file takes the graph's place."""
    model = ModelRef("onnxruntime", onnx_file, "causal-lm")

    def other(own: ModelRef) -> Iterator[repeats.Variant]:
        if own.runtime == "onnxruntime":
            yield repeats.Variant("another way", kind, model)

    monkeypatch.setattr(repeats, "variants", other)
    return lab.diff(lab.case("llama"), aa=True)


def test_another_result_of_another_run_is_a_finding(
    lab: Lab, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = plant(lab.case("llama").onnx, mutants.through_float16)
    report = variant(lab, monkeypatch, wrong, "run")
    assert found(report) == {("run", "unstable")}
    [row] = report.repeats
    assert row.ratio_max > 100 and row.nonfinite == 0
    assert variant(lab, monkeypatch, wrong, "compute").verdict == "pass"


def test_nan_in_another_run_is_counted_and_a_finding(
    lab: Lab, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = plant(lab.case("llama").onnx, mutants.nan_everywhere)
    report = variant(lab, monkeypatch, wrong, "run")
    assert found(report) == {("run", "nan")}
    assert report.repeats[0].nonfinite == report.conversion[0].elements


@pytest.mark.parametrize(
    ("defect", "expected"),
    [
        (mutants.pool_output, ("coverage", "not measured")),
        (partial(mutants.cut_features, size=199), ("coverage", "not measured")),
        (partial(mutants.fix_batch, size=77), ("run", "error")),
    ],
)
def test_another_run_that_gives_nothing_to_compare_is_a_finding(
    lab: Lab,
    plant: Plant,
    monkeypatch: pytest.MonkeyPatch,
    defect: Callable[[onnx.ModelProto], None],
    expected: tuple[str, str],
) -> None:
    report = variant(lab, monkeypatch, plant(lab.case("llama").onnx, defect), "compute")
    assert found(report) == {expected}


def test_without_asking_nothing_is_run_again(lab: Lab) -> None:
    assert lab.diff(lab.case("llama")).repeats == ()
