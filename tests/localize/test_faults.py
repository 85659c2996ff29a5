"""Faults planted in exports are named: the module, the operator or the tensor, and confirmed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest.mock import patch

import onnx
import pytest

from surgery import api, pipeline
from surgery.errors import EnvironmentFault
from surgery.localize import Localization
from surgery.localize.runs import Runs
from tests.differential import mutants
from tests.localize.campaign import Base, compare
from tests.localize.conftest import Bases

NAMED = [
    ("llama", "graph", "softmax axis", 1, "whose axis is -2, in a fresh graph -1"),
    ("llama", "graph", "rotate without sign", 1, "where a fresh graph has Neg"),
    ("llama", "graph", "residual subtracted", 0, "where a fresh graph has Add"),
    ("llama", "graph", "mask off by one", 0, "where a fresh graph has LessOrEqual"),
    ("llama", "graph", "later tokens seen", 0, "LessOrEqual"),
    ("llama", "graph", "cosine for sine", 0, "where a fresh graph has Sin"),
    ("llama", "constant", "epsilon 10% larger", 0, "= 1.1e-06, in a fresh graph 1e-06"),
    ("qwen3", "constant", "attention scale", 0, "in a fresh graph"),
    ("qwen3", "constant", "rotary in bfloat16", 0, "inv_freq"),
    ("gpt2", "weight", "scaled 0.2%", 1, "whose weight is not 'transformer.h.1.mlp.c_proj.weight'"),
    ("gpt2", "weight", "head lost", 0, "whose weight is not 'transformer.h.0.attn.c_proj.weight'"),
    ("gpt2", "graph", "float16 in between", 1, "Cast"),
    ("gpt2", "graph", "positions count padding", 0, "CumSum"),
    ("gemma2", "weight", "stale norm", 1, "layers.1.pre_feedforward_layernorm.weight'"),
    ("gemma2", "constant", "final softcap", 1, "= 18, in a fresh graph 30"),
    ("gemma2", "constant", "embedding scale", 0, "embed_scale"),
    ("gemma2", "constant", "window one shorter", 0, "= 7, in a fresh graph 8"),
    (
        "gemma2",
        "graph",
        "another activation",
        1,
        "whose approximate is none, in a fresh graph tanh",
    ),
    ("bert", "weight", "one row stale", 1, "whose weight is not"),
    ("bert", "graph", "activation lost", 0, "where a fresh graph has Gelu"),
]


def planted(
    base: Base, kind: str, fault: str, layer: int
) -> tuple[Path, Localization, dict[str, bool]]:
    path, truth = base.plant(kind, fault, layer)
    report, [found] = base.run(path)
    assert report.verdict == "fail"
    introduced = [f for f in report.findings if f.symptom == "introduced error"]
    assert [f.site for f in introduced] == [f"R_o/{fault.site}" for fault in found.faults]
    return found, compare(truth, found)


@pytest.mark.parametrize(("model", "kind", "fault", "layer", "said"), NAMED)
def test_a_planted_fault_is_named_and_confirmed(
    bases: Bases, model: str, kind: str, fault: str, layer: int, said: str
) -> None:
    found, right = planted(bases(model), kind, fault, layer)
    assert all(right.values()), (right, found.faults)
    assert len(found.faults) == 1
    assert said in str(found.faults[0])


def test_a_clean_export_has_nothing_to_find(bases: Bases) -> None:
    base = bases("llama")
    with base.here.installed():
        found = pipeline.localize(base.model, onnx=base.onnx)["C_o"]
    assert found.clean
    assert len(found.rows) > 20
    assert not found.left_out
    assert not list(found.findings("R_o"))


def test_one_cause_in_every_layer_is_one_fault_with_its_places(bases: Bases) -> None:
    found, _ = planted(bases("llama"), "constant", "epsilon tenfold", 0)
    (fault,) = found.faults
    assert fault.site == "input_norm.0"
    assert {"mlp_norm.0", "input_norm.1", "mlp_norm.1"} <= set(fault.also)


# ------------------------------------------------------------------------- what cannot be told


def changed(base: Base, tmp_path: Path, *defects: object) -> Path:
    model = onnx.load(str(base.onnx))
    for defect in defects:
        defect(model)  # type: ignore[operator]
    path = tmp_path / "changed.onnx"
    onnx.save(model, str(path))
    return path


def anonymous(model: onnx.ModelProto) -> None:
    """Every weight under a name that says nothing, its rows turned round and back."""
    shapes = {t.name: list(t.dims) for t in model.graph.initializer}
    wanted = [name for name, dims in shapes.items() if name.endswith(("weight", "weight.T"))]
    for number, name in enumerate(wanted):
        mutants.reverse_rows(model, name, f"w{number}")


def test_a_graph_without_any_known_weight_is_told_plainly(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    path = changed(base, tmp_path, anonymous, mutants.through_float16)
    _, [found] = base.run(path)
    assert not found.clean
    assert found.rows


def test_nan_everywhere_is_never_clean(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    report, [found] = base.run(changed(base, tmp_path, mutants.nan_everywhere))
    assert report.verdict == "fail"
    assert found.faults[0].introduced == float("inf")
    assert found.faults[0].site in ("lm_head", "logits")


def test_an_output_of_another_name_is_still_found(bases: Bases, tmp_path: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        mutants.rename_output(model, "scores")

    base = bases("llama")
    with base.here.installed():
        path = changed(base, tmp_path, rename)
        assert pipeline.localize(base.model, onnx=path)["C_o"].clean
        path = changed(base, tmp_path, mutants.through_float16, rename)
        found = pipeline.localize(base.model, onnx=path)["C_o"]
    assert [fault.operator.kind for fault in found.faults if fault.operator] == ["Cast"]


@pytest.mark.parametrize("error", [EnvironmentFault("a run: crash"), ValueError("bug")])
def test_a_search_that_fails_keeps_the_verdict(bases: Bases, error: Exception) -> None:
    base = bases("llama")
    path, _ = base.plant("graph", "softmax axis", 0)

    def fail(*args: object, **named: object) -> None:
        raise error

    with base.here.installed(), patch.object(Runs, "onnx", fail):
        report = pipeline.diff(base.model, onnx=path)
        found = pipeline.localize(base.model, onnx=path)["C_o"]
    assert report.verdict == "fail"
    stages = [finding.stage for finding in report.findings]
    assert "conversion" in stages
    (told,) = (finding for finding in report.findings if finding.stage == "localize")
    assert str(error) in told.message
    assert not found.clean
    assert str(error) in found.note


def test_a_model_that_is_not_finite_itself_is_told(bases: Bases) -> None:
    base = bases("llama")
    real = Runs.torch

    def broken(self: Runs, boundaries: object, dtype: str) -> object:
        values = real(self, boundaries, dtype)  # type: ignore[arg-type]
        return {site: array * float("nan") for site, array in values.items()}

    path, _ = base.plant("graph", "softmax axis", 0)
    with base.here.installed(), patch.object(Runs, "torch", broken):
        found = pipeline.localize(base.model, onnx=path)["C_o"]
    assert not found.clean
    assert "PyTorch itself gives numbers that are not finite" in found.note


def test_a_localization_without_rows_is_not_clean() -> None:
    assert not Localization((), (), "batch").clean
    assert dataclasses.asdict(Localization((), (), "batch"))["note"] == ""
    assert api.localize
