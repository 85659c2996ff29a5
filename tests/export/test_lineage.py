"""What initializers are, by name, by use, by content, and by claim; and tensors no initializer
holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from surgery.checkpoint import Checkpoint
from surgery.errors import OnnxError
from surgery.export import default_task
from surgery.export.expressions import (
    Cast,
    Concat,
    Expression,
    Fold,
    Slice,
    Stack,
    Tensor,
    Transpose,
)
from surgery.export.lineage import CLAIMS, Lineage, Row, diagnosis, render, trace
from surgery.export.lineage.expected import Names
from tests.models import FAMILIES, Zoo, make
from tests.onnx_files import model, save

Array = NDArray[Any]
BUFFERS = {
    "gpt2": set(),
    "llama": {"model.rotary_emb.inv_freq"},
    "qwen3": {"model.rotary_emb.inv_freq"},
    "bert": {"embeddings.position_ids", "embeddings/Expand_1"},  # and the type ids, expanded
}
"""Initializers of more than three elements that are no tensor of the checkpoint."""
LAYER = "model.layers.0"


def graph(path: Path, weights: dict[str, Array], nodes: list[Any] | None = None) -> Path:
    """A file with these initializers, one of which is looked up and the rest of which are not."""
    table = numpy_helper.from_array(np.arange(8, dtype=np.float32).reshape(8, 1), "table")
    lookup = helper.make_node("Gather", ["table", "input_ids"], ["logits"])
    tensors = [numpy_helper.from_array(np.ascontiguousarray(w), n) for n, w in weights.items()]
    return save(model([*(nodes or []), lookup], ["input_ids"], "logits", [*tensors, table]), path)


def row_of(found: Lineage, name: str) -> Row:
    (row,) = (row for row in found.rows if row.name == name)
    return row


def faults_of(found: Lineage) -> dict[str | None, str]:
    """Symptom by initializer, but for tensors that a partial graph does not hold."""
    return {f.initializer: f.symptom for f in found.findings if f.symptom != diagnosis.MISSING}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clean_export_is_the_checkpoint(zoo: Zoo, family: str) -> None:
    source = zoo.checkpoint(family)
    path = zoo.onnx(family, default_task(source).name)
    found = trace(path, source)
    assert found.ok
    sizes = {t.name: math.prod(t.dims) for t in onnx.load(str(path)).graph.initializer}
    constants = {row.name for row in found.rows if row.status == "constant"}
    assert {name for name in constants if sizes[name] > 3} == BUFFERS[family]
    assert {row.status for row in found.rows} <= {"proven", "constant"}
    # What the exporter wrote down, and nothing else, is what is proven.
    said = json.loads(path.with_name(CLAIMS).read_text())["initializers"]
    proven = [row for row in found.rows if row.status == "proven"]
    assert {e["name"]: e["tensors"][0] for e in said} == {r.name: r.tensors[0] for r in proven}
    if family != "bert":  # whose masked-LM head no encoder reads
        assert set(found.held()) == set(Checkpoint.open(source).tensors)
    else:
        assert set(found.unused.values()) == {"a head that the task does not need"}


def test_narrow_exports_are_compared_after_the_cast(zoo: Zoo) -> None:
    narrow = zoo.onnx("llama", "causal-lm", dtype="float16", stored="bfloat16")
    found = trace(narrow, zoo.checkpoint("llama", "bfloat16"))
    assert found.ok
    transforms = {row.transform for row in found.rows if row.tensors}
    assert transforms == {("cast",), ("transpose", "cast")}


def test_the_json_names_everything(zoo: Zoo) -> None:
    source = zoo.checkpoint("bert")
    found = trace(zoo.onnx("bert", "encoder"), source).to_json()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"onnx", "model", "initializers", "tensors", "findings"}
    assert set(found["tensors"]) == set(Checkpoint.open(source).tensors)
    name = "encoder.layer.0.output.dense.bias"
    assert found["tensors"][f"bert.{name}"] == [name]
    assert found["tensors"]["cls.predictions.bias"] == {
        "unused": "a head that the task does not need"
    }


def test_transforms_are_found_by_content(zoo: Zoo, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(zoo.checkpoint("llama"))
    q, k, v = (checkpoint.read(f"{LAYER}.self_attn.{n}_proj.weight") for n in "qkv")
    weights = {
        "onnx::MatMul_7": checkpoint.read(f"{LAYER}.mlp.up_proj.weight").T,
        "fused": np.concatenate([q, k, v]).T,
        "narrow": checkpoint.read(f"{LAYER}.mlp.down_proj.weight").astype(np.float16),
        "scaled": q * np.float32(8**-0.5),
        "stranger": np.random.default_rng(0).standard_normal((101, 32)).astype(np.float32),
        "other": np.ones((5, 7), np.float32),
    }
    found = trace(graph(tmp_path / "m.onnx", weights), checkpoint.root)
    assert {row.name: (row.status, row.transform) for row in found.rows} == {
        "onnx::MatMul_7": ("proven", ("transpose",)),
        "fused": ("proven", ("concatenation", "transpose")),
        "narrow": ("proven", ("cast",)),
        "scaled": ("proven", ("folded expression",)),
        "stranger": ("unmatched", ()),
        "other": ("constant", ()),
        "table": ("constant", ()),
    }
    assert row_of(found, "fused").tensors == tuple(
        f"{LAYER}.self_attn.{n}_proj.weight" for n in "qkv"
    )
    assert not found.ok


def test_slices_of_a_fused_projection_are_found(zoo: Zoo, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(zoo.checkpoint("gpt2"))
    fused = checkpoint.read("transformer.h.1.attn.c_attn.weight")
    weights = {part: fused[:, 32 * n : 32 * n + 32] for n, part in enumerate("qkv")}
    found = trace(graph(tmp_path / "m.onnx", weights), checkpoint.root)
    expected = {
        part: Slice(Tensor("transformer.h.1.attn.c_attn.weight"), 1, 32 * n, 32 * n + 32).to_json()
        for n, part in enumerate("qkv")
    }
    assert {part: row_of(found, part).expression for part in "qkv"} == expected


def test_interleaved_projections_are_taken_apart(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make("gpt_neox", tmp_path / "neox"))
    fused = checkpoint.read("gpt_neox.layers.0.attention.query_key_value.weight")
    parts = fused.reshape(4, 3, 8, 32)
    weights = {name: parts[:, n].reshape(32, 32) for n, name in enumerate("qkv")}
    found = trace(graph(tmp_path / "m.onnx", weights), checkpoint.root)
    for name in "qkv":
        row = row_of(found, name)
        assert (row.status, row.transform) == ("proven", ("slice", "concatenation"))


@pytest.mark.parametrize("family", ["gemma"])
def test_the_offset_of_gemma_norms_is_a_folded_constant(
    zoo: Zoo, family: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(zoo.checkpoint(family, "bfloat16"))
    norm = checkpoint.read("model.norm.weight").astype(np.float32)
    table = checkpoint.read("model.embed_tokens.weight").astype(np.float32)
    weights = {
        "model.norm.weight": norm + np.float32(1),
        "embedding": table * np.float32(np.sqrt(32)),
        "model.layers.0.input_layernorm.weight": norm * np.float32(1.002),
    }
    found = trace(graph(tmp_path / "m.onnx", weights), checkpoint.root)
    assert row_of(found, "model.norm.weight").transform == ("folded expression",)
    assert row_of(found, "embedding").transform == ("folded expression",)
    assert faults_of(found) == {"model.layers.0.input_layernorm.weight": diagnosis.STALE}


def test_equal_tensors_are_all_named(tmp_path: Path) -> None:
    """Exporters keep one of several equal initializers: it is every tensor that it equals."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=101, num_attention_heads=4, **sizes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    norms = [
        *(
            f"model.layers.{n}.{k}_layernorm.weight"
            for n in (0, 1)
            for k in ("input", "post_attention")
        ),
        "model.norm.weight",
    ]
    weights = {"model.norm.weight": np.ones(32, np.float32), "val_1": np.ones(32, np.float32)}
    found = trace(graph(tmp_path / "m.onnx", weights), tmp_path / "model")
    named, unnamed = (row_of(found, name) for name in weights)
    assert (named.status, unnamed.status) == ("proven", "ambiguous")
    assert set(named.tensors) == set(unnamed.tensors) == set(norms)
    assert named.tensors[0] == "model.norm.weight"
    assert not any(f.tensor in norms for f in found.findings)


def test_a_tensor_that_nothing_holds_is_missing(zoo: Zoo, tmp_path: Path) -> None:
    source = zoo.checkpoint("llama")
    path = zoo.onnx("llama", "causal-lm")
    proto = onnx.load(str(path))
    name = f"{LAYER}.mlp.up_proj.weight"
    (held,) = trace(path, source).held()[name]
    fresh = np.random.default_rng(1).standard_normal((48, 32)).astype(np.float32)
    for tensor in proto.graph.initializer:
        if tensor.name == held:
            tensor.CopyFrom(numpy_helper.from_array(fresh, "renamed"))
    for node in proto.graph.node:
        node.input[:] = ["renamed" if value == held else value for value in node.input]
        del node.metadata_props[:]
    found = trace(save(proto, tmp_path / "m.onnx"), source)
    (fault,) = found.findings
    assert (fault.symptom, fault.initializer, fault.tensor) == (diagnosis.MISSING, "renamed", name)
    proto.graph.initializer.add().CopyFrom(numpy_helper.from_array(fresh + 1, "second"))
    found = trace(save(proto, tmp_path / "m.onnx"), source)
    (fault,) = found.findings
    assert (fault.symptom, fault.initializer, fault.tensor) == (diagnosis.MISSING, None, name)
    assert "renamed" in fault.message and "second" in fault.message
    assert found.unused == {name: "no initializer holds it"}


def test_other_shapes_and_dtypes_are_named(zoo: Zoo, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(zoo.checkpoint("llama"))
    up, gate = (f"{LAYER}.mlp.{n}_proj.weight" for n in ("up", "gate"))
    weights = {up: checkpoint.read(up)[:40], gate: checkpoint.read(gate).astype(np.int32)}
    found = trace(graph(tmp_path / "m.onnx", weights), checkpoint.root)
    assert faults_of(found) == {up: diagnosis.SHAPE, gate: diagnosis.DTYPE}


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_square_matrix_must_be_the_way_round_that_its_product_needs(
    zoo: Zoo, tmp_path: Path, stored: str
) -> None:
    checkpoint = Checkpoint.open(zoo.checkpoint("llama", stored))
    name = f"{LAYER}.self_attn.o_proj.weight"
    weight = checkpoint.read(name).astype(np.float32)
    product = helper.make_node("MatMul", ["input", "val_3"], ["y"])
    node = helper.make_node("Constant", [], ["input"], value=numpy_helper.from_array(weight))
    for values, expected in ((weight.T, {}), (weight, {"val_3": diagnosis.TRANSPOSED})):
        path = graph(tmp_path / "m.onnx", {"val_3": values}, [node, product])
        assert faults_of(trace(path, checkpoint.root)) == expected


# --------------------------------------------------------------------------------------- claims


def claimed(folder: Path, source: Path, expressions: dict[str, Expression]) -> Path:
    (folder / CLAIMS).write_text(render("m.onnx", str(source), expressions, {}))
    return folder / "m.onnx"


def test_a_claim_is_proven_and_names_what_no_name_does(zoo: Zoo, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(zoo.checkpoint("llama"))
    name = f"{LAYER}.mlp.up_proj.weight"
    upper = checkpoint.read(name)[8:40]
    path = graph(tmp_path / "m.onnx", {"w": upper, "gone": upper + 1})
    assert row_of(trace(path, checkpoint.root), "w").status == "unmatched"
    claim: Expression = Slice(Tensor(name), 0, 8, 40)
    found = trace(claimed(tmp_path, checkpoint.root, {"w": claim, "gone": claim}), checkpoint.root)
    assert row_of(found, "w").status == "proven"
    assert row_of(found, "w").expression == claim.to_json()
    assert faults_of(found) == {"gone": diagnosis.STALE}


@pytest.mark.parametrize(
    "claim",
    [
        Tensor(f"{LAYER}.mlp.gate_proj.weight"),
        Fold(Tensor(f"{LAYER}.mlp.up_proj.weight"), factor=1.002),
        Transpose(Tensor(f"{LAYER}.mlp.up_proj.weight")),
    ],
)
def test_a_false_claim_is_a_finding(zoo: Zoo, tmp_path: Path, claim: Expression) -> None:
    checkpoint = Checkpoint.open(zoo.checkpoint("llama"))
    name = f"{LAYER}.mlp.up_proj.weight"
    graph(tmp_path / "m.onnx", {name: checkpoint.read(name)})
    found = trace(claimed(tmp_path, checkpoint.root, {name: claim}), checkpoint.root)
    assert faults_of(found) == {name: diagnosis.CLAIM}


def test_a_claim_cannot_fold_a_constant_that_the_family_has_not(zoo: Zoo, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(zoo.checkpoint("llama"))
    name = f"{LAYER}.mlp.up_proj.weight"
    graph(tmp_path / "m.onnx", {"w": checkpoint.read(name) * np.float32(1.002)})
    claim = Fold(Tensor(name), factor=float(np.float32(1.002)))
    found = trace(claimed(tmp_path, checkpoint.root, {"w": claim}), checkpoint.root)
    assert faults_of(found) == {"w": diagnosis.CLAIM}


BAD_CLAIMS: dict[str, Any] = {
    "no list": {"initializers": 3},
    "no name": {"initializers": [{"expression": {"tensor": "model.norm.weight"}}]},
    "twice": {"initializers": [{"name": "w"}, {"name": "w"}]},
    "no expression": {"initializers": [{"name": "w", "expression": {"pickle": 1}}]},
    "slice outside": {
        "initializers": [
            {
                "name": "w",
                "expression": Slice(Tensor("model.norm.weight"), 0, 8, 40).to_json(),
            }
        ]
    },
    "negative slice": {
        "initializers": [
            {
                "name": "w",
                "expression": Slice(Tensor("model.norm.weight"), 0, -8, 8).to_json(),
            }
        ]
    },
    "parts that do not fit": {
        "initializers": [
            {
                "name": "w",
                "expression": Concat(
                    (Tensor("model.norm.weight"), Tensor("lm_head.weight"))
                ).to_json(),
            }
        ]
    },
    "no float": {
        "initializers": [
            {"name": "w", "expression": Cast(Tensor("model.norm.weight"), "int8").to_json()}
        ]
    },
    "larger than the checkpoint": {
        "initializers": [
            {
                "name": "w",
                "expression": Concat((Tensor("lm_head.weight"),) * 999).to_json(),
            }
        ]
    },
}


@pytest.mark.parametrize("claim", BAD_CLAIMS)
def test_a_malformed_claim_is_bad_input(zoo: Zoo, tmp_path: Path, claim: str) -> None:
    path = graph(tmp_path / "m.onnx", {"w": np.ones((8, 4), np.float32)})
    (tmp_path / CLAIMS).write_text(json.dumps(BAD_CLAIMS[claim]))
    with pytest.raises(OnnxError, match=r"lineage\.json"):
        trace(path, zoo.checkpoint("llama"))


def test_a_name_that_could_mean_two_tensors_means_none() -> None:
    def find(name: str, *tensors: str) -> Any:
        return Names({tensor: Tensor(tensor) for tensor in tensors}).find(name)

    assert find("x.weight", "a.x.weight", "b.x.weight") is None
    assert find("x.weight", "a.x.weight", "x.weight") == Tensor("x.weight")
    assert find("c.x.weight", "a.x.weight", "b.x.weight") is None


def test_a_claim_about_another_model_tells_nothing(zoo: Zoo, tmp_path: Path) -> None:
    source = zoo.checkpoint("llama")
    path = graph(tmp_path / "m.onnx", {"w": np.full((32, 32), 0.5, np.float32)})
    without = trace(path, source)
    claim = {"initializers": [{"name": "w", "expression": {"tensor": "gone"}}]}
    (tmp_path / CLAIMS).write_text(json.dumps(claim))
    assert trace(path, source) == without
    assert not without.ok


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1, "a": 2}', "[" * 10_000])
def test_a_claim_that_is_no_json_object_is_bad_input(zoo: Zoo, tmp_path: Path, text: str) -> None:
    path = graph(tmp_path / "m.onnx", {"w": np.ones((8, 4), np.float32)})
    (tmp_path / CLAIMS).write_text(text)
    with pytest.raises(OnnxError, match=r"lineage\.json"):
        trace(path, zoo.checkpoint("llama"))


def test_names_of_what_is_made_of_tensors() -> None:
    parts = (Tensor("one"), Tensor("two"))
    names = Names({"a.w": Stack(parts), "a.v": Tensor("three")})
    expected = {
        "a.w.1": parts[1],
        "a.w.T.1": parts[1],
        "a.w.1.T": parts[1],
        "a.v.T": Tensor("three"),
        "a.w.2": None,
        "a.v.0": None,
        "a.w.1.0": None,
        "a.w" + ".T" * 100_000: None,
        "a.w." + "9" * 10_000: None,
    }
    assert {name: names.find(name) for name in expected} == expected


def test_a_bad_file_is_refused_first(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"garbage")
    with pytest.raises(OnnxError):
        trace(tmp_path / "m.onnx", zoo.checkpoint("llama"))
