"""Weights in 8 bits are recomputed as `quantize_dynamic` rounds them, and faults in them named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from surgery.checkpoint import Checkpoint
from surgery.export.lineage import Lineage, diagnosis, trace
from tests.models import Zoo
from tests.onnx_files import model, save

MLP = "model.layers.0.mlp"
TABLE = "model.embed_tokens.weight"
SCHEMES: dict[str, dict[str, Any]] = {
    "signed": {},
    "unsigned": {"weight_type": "QUInt8"},
    "per channel": {"per_channel": True},
    "unsigned per channel": {"per_channel": True, "weight_type": "QUInt8"},
    "reduced": {"reduce_range": True},
    "reduced per channel": {"reduce_range": True, "per_channel": True},
    "asymmetric": {"extra_options": {"WeightSymmetric": False}},
}


def small(checkpoint: Checkpoint, path: Path) -> Path:
    """Embedding, up and down: a Gather and two MatMuls, one weight of which nothing names."""
    up, down = (
        checkpoint.read(f"{MLP}.{n}_proj.weight").astype(np.float32) for n in ("up", "down")
    )
    weights = {TABLE: checkpoint.read(TABLE).astype(np.float32), f"{MLP}.up_proj.weight": up.T}
    weights["val_7"] = down.T
    nodes = [
        helper.make_node("Gather", [TABLE, "input_ids"], ["x"], name="embed"),
        helper.make_node("MatMul", ["x", f"{MLP}.up_proj.weight"], ["y"], name="up"),
        helper.make_node("MatMul", ["y", "val_7"], ["logits"], name="down"),
    ]
    tensors = [numpy_helper.from_array(np.ascontiguousarray(w), n) for n, w in weights.items()]
    return save(model(nodes, ["input_ids"], "logits", tensors), path)


def quantise(source: Path, target: Path, scheme: str) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = dict(SCHEMES[scheme])
    kind = getattr(QuantType, options.pop("weight_type", "QInt8"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_dynamic(source, target, ["MatMul", "Gather"], weight_type=kind, **options)
    return target


@pytest.fixture
def quantised(zoo: Zoo, tmp_path: Path) -> Callable[[str], Path]:
    def make(scheme: str) -> Path:
        checkpoint = Checkpoint.open(zoo.checkpoint("llama", "bfloat16"))
        return quantise(small(checkpoint, tmp_path / "m.onnx"), tmp_path / "q.onnx", scheme)

    return make


def of_weights(found: Lineage) -> list[tuple[str, str | None, str | None]]:
    """Findings but for the tensors that so small a graph leaves out."""
    named = [(f.symptom, f.initializer, f.tensor) for f in found.findings]
    return [finding for finding in named if finding[0] != diagnosis.MISSING]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_proven(zoo: Zoo, quantised: Callable[[str], Path], scheme: str) -> None:
    found = trace(quantised(scheme), zoo.checkpoint("llama", "bfloat16"))
    assert of_weights(found) == []
    rows = {row.name: row for row in found.rows}
    expected = {
        TABLE: TABLE,
        f"{MLP}.up_proj.weight": f"{MLP}.up_proj.weight",
        "val_7": f"{MLP}.down_proj.weight",
    }
    for base, tensor in expected.items():
        for part in ("quantized", "scale", "zero_point"):
            row = rows[f"{base}_{part}"]
            assert (row.status, row.tensors) == ("proven", (tensor,)), row
            assert row.transform[-1] == "quantised"


Change = Callable[[NDArray[Any]], NDArray[Any]]


def _one(values: NDArray[Any]) -> NDArray[Any]:
    changed = values.copy()
    changed[3, 5] += 1 if changed[3, 5] < 100 else -1
    return changed


def _tail(values: NDArray[Any]) -> NDArray[Any]:
    changed = values.copy()
    changed[len(values) // 2 :] = 0
    return changed


DAMAGE: dict[str, tuple[str, Change, str]] = {
    "one integer": ("_quantized", _one, diagnosis.ELEMENT),
    "zeros": ("_quantized", _tail, diagnosis.TRUNCATED),
    "the scale": ("_scale", lambda scale: scale * np.float32(1.01), diagnosis.QUANTISED),
}


@pytest.mark.parametrize("name", [f"{MLP}.up_proj.weight", "val_7", TABLE])
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("scheme", ["signed", "per channel"])
def test_damage_is_named(
    zoo: Zoo, quantised: Callable[[str], Path], name: str, damage: str, scheme: str
) -> None:
    part, change, symptom = DAMAGE[damage]
    path = quantised(scheme)
    proto = onnx.load(str(path))
    (tensor,) = (t for t in proto.graph.initializer if t.name == name + part)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))
    expected = f"{MLP}.down_proj.weight" if name == "val_7" else name
    found = trace(save(proto, path), zoo.checkpoint("llama", "bfloat16"))
    assert of_weights(found) == [(symptom, f"{name}_quantized", expected)]


@pytest.mark.parametrize("scheme", ["signed", "per channel"])
def test_a_stale_weight_is_named(
    zoo: Zoo, quantised: Callable[[str], Path], scheme: str, tmp_path: Path
) -> None:
    """The same names with the numbers of the same model in another precision's random state."""
    found = trace(quantised(scheme), zoo.checkpoint("mistral"))
    assert (diagnosis.STALE, f"{TABLE}_quantized", TABLE) in of_weights(found)
