"""Every initializer of a clean export is a checkpoint tensor, bit for bit; a changed one is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from surgery.checkpoint import Checkpoint
from surgery.errors import OnnxError
from surgery.export import default_task
from surgery.export.lineage import Lineage, compare_initializers
from tests.models import FAMILIES, Zoo
from tests.onnx_files import model, save

BUFFERS = {
    "gpt2": set(),
    "llama": {"model.rotary_emb.inv_freq"},
    "qwen3": {"model.rotary_emb.inv_freq"},
    "bert": {"embeddings.position_ids", "embeddings.token_type_ids"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clean_export_is_the_checkpoint(zoo: Zoo, family: str) -> None:
    source = zoo.checkpoint(family)
    rows = compare_initializers(zoo.onnx(family, default_task(source).name), source)
    assert {row.initializer for row in rows if row.tensor is None} == BUFFERS[family]
    assert {row.status for row in rows if row.tensor} == {"equal"}
    if family != "bert":  # whose masked-LM head no encoder reads
        assert {row.tensor for row in rows if row.tensor} == set(Checkpoint.open(source).tensors)


@pytest.mark.parametrize("family", ["llama"])
def test_narrow_exports_are_compared_after_the_cast(zoo: Zoo, family: str) -> None:
    narrow = zoo.onnx(family, "causal-lm", dtype="float16", stored="bfloat16")
    rows = compare_initializers(narrow, zoo.checkpoint(family, "bfloat16"))
    assert {row.status for row in rows if row.tensor} == {"equal"}


def test_one_flipped_bit_shows_in_its_tensor_alone(zoo: Zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo.onnx("gpt2", "causal-lm").parent, tmp_path / "m")
    path = tmp_path / "m" / "model.onnx"
    proto = onnx.load(path, load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.name.endswith("h.1.mlp.c_fc.weight"))
    fields = {entry.key: entry.value for entry in tensor.external_data}
    data = bytearray(path.with_name(fields["location"]).read_bytes())
    data[int(fields["offset"]) + 5] ^= 1
    path.with_name(fields["location"]).write_bytes(data)
    rows = compare_initializers(path, zoo.checkpoint("gpt2"))
    assert [row.initializer for row in rows if row.status != "equal"] == [tensor.name]
    assert [row.status for row in rows if row.initializer == tensor.name] == ["different"]


def test_renamed_transposed_and_foreign_initializers(zoo: Zoo, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(zoo.checkpoint("llama"))
    up, down = (checkpoint.read(f"model.layers.0.mlp.{n}_proj.weight") for n in ("up", "down"))
    table = np.ascontiguousarray(checkpoint.read("model.embed_tokens.weight"))
    weights = {
        "onnx::MatMul_7": np.ascontiguousarray(up.T),
        "model.layers.0.mlp.down_proj.weight": np.ascontiguousarray(down.T),
        "table": table,
        "layers.1.mlp.up_proj.weight": up,
        "stranger": np.ones((101, 32), np.float32),
    }
    node = helper.make_node("Gather", ["table", "input_ids"], ["logits"])
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    path = save(model([node], ["input_ids"], "logits", tensors), tmp_path / "m.onnx")
    assert compare_initializers(path, zoo.checkpoint("llama")) == (
        Lineage("onnx::MatMul_7", "model.layers.0.mlp.up_proj.weight", "transposed"),
        Lineage(
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.0.mlp.down_proj.weight",
            "transposed",
        ),
        Lineage("table", "model.embed_tokens.weight", "equal"),
        Lineage("layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "different"),
        Lineage("stranger", None, "unmatched"),
    )


def test_a_bad_file_is_refused_first(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"garbage")
    with pytest.raises(OnnxError):
        compare_initializers(tmp_path / "m.onnx", zoo.checkpoint("llama"))
