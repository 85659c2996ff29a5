"""A linked graph looks token embeddings up as they are stored: only the rows are cast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest

from surgery.checkpoint import Checkpoint
from surgery.export.capture import capture
from surgery.export.layouts.linked import link
from surgery.export.load import load_model
from surgery.export.tasks import TASKS
from tests.models import make

IDS = np.array([[3, 40, 5, 0], [7, 7, 1, 2]])
TABLES = {
    "gpt2": ("transformer.wte.weight", "transformer.wpe.weight"),
    "llama": ("model.embed_tokens.weight",),
    "qwen3": ("model.embed_tokens.weight",),
}
"""Families to the tables they look rows up in; the head of gpt2 is its first table too."""


def linked(folder: Path) -> Any:
    model = capture(folder, "causal-lm")
    link(model, Checkpoint.open(folder))
    return model


def run(model: Any, folder: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    key = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(key, str(folder))
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString(), options)
    positions = np.broadcast_to(np.arange(4), IDS.shape)
    known = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "position_ids": positions}
    return session.run(["logits"], {value.name: known[value.name] for value in model.graph.inputs})


@pytest.mark.parametrize("family", TABLES)
def test_lookups_read_the_stored_table_and_the_numbers_are_the_same(
    tmp_path: Path, family: str
) -> None:
    import torch

    folder = make(family, tmp_path / "m", dtype="bfloat16")
    model = linked(folder)
    lookups = [node for node in model.graph if node.op_type == "Gather"]
    assert {node.inputs[0].name for node in lookups} == set(TABLES[family])
    for node in lookups:
        assert node.outputs[0].dtype == onnx_ir.DataType.BFLOAT16
        [cast] = node.outputs[0].consumers()
        assert cast.op_type == "Cast" and cast.outputs[0].dtype == onnx_ir.DataType.FLOAT
    ids = torch.tensor(IDS)
    expected = load_model(folder, TASKS["causal-lm"], "float32")(ids).logits.detach().numpy()
    np.testing.assert_allclose(run(model, folder)[0], expected, rtol=0, atol=1e-5)


def test_a_table_nothing_else_reads_is_never_cast_whole(tmp_path: Path) -> None:
    model = linked(make("llama", tmp_path / "m", dtype="bfloat16"))
    [table] = [v for name, v in model.graph.initializers.items() if "embed_tokens" in name]
    assert [node.op_type for node in table.consumers()] == ["Gather"]


def test_a_table_stored_as_it_is_computed_with_needs_no_cast(tmp_path: Path) -> None:
    model = linked(make("llama", tmp_path / "m"))
    assert not [node for node in model.graph if node.name.endswith("/Cast")]
