"""Each runtime gives the same numbers through the same contract."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from surgery.checkpoint import Checkpoint
from surgery.errors import OnnxError
from surgery.export import default_task
from surgery.runtimes import RUNTIMES, ModelRef, Runtime
from surgery.runtimes.graph import cut_after_embedding
from tests.batches import BATCHES
from tests.models import FAMILIES, Zoo
from tests.onnx_files import ROWS, TABLE, externally, lookup, model, save

ONNX = ("onnxruntime", "reference")
EMBEDDINGS = {
    "gpt2": "transformer.wte.weight",
    "llama": "model.embed_tokens.weight",
    "qwen3": "model.embed_tokens.weight",
    "bert": "bert.embeddings.word_embeddings.weight",
}


def load(runtime: str, path: Path, task: str = "causal-lm", **fields: Any) -> Runtime:
    return RUNTIMES[runtime](ModelRef(runtime, path, task, **fields), 1)


def test_listing_the_runtimes_imports_none_of_them() -> None:
    code = (
        "import sys, surgery.runtimes, surgery.export; print(list(surgery.runtimes.RUNTIMES), "
        "{'torch', 'transformers', 'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = ["torch", "onnxruntime", "torch-streamed", "onnxruntime-streamed", "reference"]
    assert done.stdout == f"{names} set()\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_float64_throughout_and_survives_padding(zoo: Zoo, family: str) -> None:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    narrow: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            if any(leaf.dtype in (torch.float32, torch.bfloat16) for leaf in leaves):
                narrow.append(str(func))
            return result

    source = zoo.checkpoint(family)
    task = default_task(source)
    reference = load("torch", source, task.name, dtype="float64")
    single = load("torch", source, task.name)
    for batch in BATCHES:
        real = batch.attention_mask == 1
        with Watch():
            exact = reference.infer(batch.inputs())[task.output]
        noise = np.abs(single.infer(batch.inputs())[task.output] - exact)[real].max()
        assert exact.dtype == np.float64
        assert np.isfinite(exact[real]).all(), batch.name
        assert 0 < noise < 5e-6, batch.name
    assert narrow == []


@pytest.mark.parametrize("runtime", ONNX)
@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_runtimes_agree_with_torch(zoo: Zoo, family: str, runtime: str) -> None:
    task = default_task(zoo.checkpoint(family))
    expected = load("torch", zoo.checkpoint(family), task.name)
    found = load(runtime, zoo.onnx(family, task.name), task.name)
    assert found.input_names == task.inputs
    assert found.output_names == (task.output,)
    for batch in BATCHES:
        real = batch.attention_mask == 1
        np.testing.assert_allclose(
            found.infer(batch.inputs())[task.output][real],
            expected.infer(batch.inputs())[task.output][real],
            rtol=0,
            atol=1e-5,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_rows_are_the_checkpoints_in_every_runtime(zoo: Zoo, family: str) -> None:
    source = zoo.checkpoint(family)
    task = default_task(source).name
    table = Checkpoint.open(source).read(EMBEDDINGS[family])
    ids = np.array([100, 0, 7, 7, 3], np.int64)
    for runtime in ("torch", *ONNX):
        path = source if runtime == "torch" else zoo.onnx(family, task)
        np.testing.assert_array_equal(load(runtime, path, task).embedding(ids), table[ids])


def test_caches_are_returned_by_torch_and_onnx_alike(zoo: Zoo) -> None:
    task = "causal-lm-with-past"
    batch = BATCHES[0]
    expected = load("torch", zoo.checkpoint("llama"), task)
    found = load("onnxruntime", zoo.onnx("llama", task), task)
    one, two = expected.infer(batch.inputs()), found.infer(batch.inputs())
    assert expected.output_names == found.output_names == tuple(one) == tuple(two)
    assert one["present.1.value"].shape == (3, 2, 9, 8)
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=0, atol=1e-5)


def three_inputs(names: list[str], kind: int = TensorProto.INT64) -> onnx.ModelProto:
    """logits = table[ids] + mask + 10 · positions: what was fed shows in the result."""
    ids, mask, positions = names
    nodes = [
        helper.make_node("Gather", ["table", ids], ["rows"]),
        helper.make_node("Cast", [mask], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Cast", [positions], ["p"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["p", "ten"], ["p10"]),
        helper.make_node("Add", ["m", "p10"], ["sum"]),
        helper.make_node("Unsqueeze", ["sum", "last"], ["column"]),
        helper.make_node("Add", ["rows", "column"], ["hidden"]),
    ]
    weights = [
        numpy_helper.from_array(TABLE, "table"),
        numpy_helper.from_array(np.float32(10), "ten"),
        numpy_helper.from_array(np.array([2]), "last"),
    ]
    proto = model(nodes, names, "hidden", weights)
    for value in proto.graph.input:
        value.type.tensor_type.elem_type = kind
    return proto


@pytest.mark.parametrize("runtime", ONNX)
@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32])
@pytest.mark.parametrize(
    "names",
    [
        ["input_ids", "attention_mask", "position_ids"],
        ["onnx::0", "onnx::1", "onnx::2"],
        ["tokens", "attention_mask", "positions"],
    ],
)
def test_foreign_inputs_are_mapped_by_order_and_the_rank_3_output_is_found(
    tmp_path: Path, runtime: str, kind: int, names: list[str]
) -> None:
    loaded = load(runtime, save(three_inputs(names, kind), tmp_path / "m.onnx"))
    inputs = {
        "input_ids": np.array([[1, 2, 3]]),
        "attention_mask": np.array([[0, 1, 1]]),
        "position_ids": np.array([[0, 0, 1]]),
    }
    expected = TABLE[[1, 2, 3]] + np.array([[0], [1], [11]], np.float32)
    found = loaded.infer(inputs)
    assert set(found) == {"logits"}
    np.testing.assert_allclose(found["logits"][0], expected)


def test_inputs_that_cannot_be_fed_are_refused_with_what_was_expected(tmp_path: Path) -> None:
    path = save(lookup(ids="pixels"), tmp_path / "m.onnx")
    proto = onnx.load(path)
    proto.graph.input[0].type.tensor_type.shape.dim.add().dim_value = 3
    with pytest.raises(OnnxError, match=r"'pixels' int64 \[None, None, 3\]; expected input_ids"):
        load("onnxruntime", save(proto, path))
    text = save(model([], [], "logits", [numpy_helper.from_array(TABLE, "logits")]), path)
    with pytest.raises(OnnxError, match="expected token ids"):
        load("onnxruntime", text)


def test_an_output_that_is_not_there_is_not_guessed(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT)
    flat = model([node], ["input_ids"], "ids", [], shape=("b", "l"))
    found = load("onnxruntime", save(flat, tmp_path / "m.onnx")).infer(BATCHES[0].inputs())
    assert set(found) == {"ids"}


@pytest.mark.parametrize("runtime", ONNX)
def test_external_data_is_found_in_the_folder_named(tmp_path: Path, runtime: str) -> None:
    weights, graphs = tmp_path / "weights", tmp_path / "graphs"
    weights.mkdir()
    graphs.mkdir()
    path = externally(lookup(), weights / "m.onnx").rename(graphs / "m.onnx")
    ids = np.arange(ROWS)
    loaded = load(runtime, path, initializers=weights)
    np.testing.assert_array_equal(loaded.infer({"input_ids": ids[None]})["logits"][0], TABLE)
    np.testing.assert_array_equal(loaded.embedding(ids), TABLE)
    with pytest.raises(OnnxError, match="No such file"):
        load(runtime, path)


def test_the_lookup_of_something_else_is_not_taken_for_the_embedding() -> None:
    proto = three_inputs(["input_ids", "attention_mask", "position_ids"])
    roles = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    proto.graph.node[0].input[1] = "position_ids"
    with pytest.raises(OnnxError, match="no Gather"):
        cut_after_embedding(proto, roles, "m.onnx")


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": np.zeros(3, np.int64)},
        {"input_ids": np.zeros((0, 3), np.int64)},
        {"input_ids": np.zeros((1, 3), np.int32)},
        {"input_ids": np.zeros((1, 3), np.int64), "attention_mask": np.ones((1, 4), np.int64)},
    ],
)
def test_malformed_inputs_never_reach_a_runtime(tmp_path: Path, inputs: dict[str, Any]) -> None:
    loaded = load("reference", save(lookup(), tmp_path / "m.onnx"))
    with pytest.raises(ValueError, match="inputs must"):
        loaded.infer(inputs)


@pytest.mark.parametrize("split", [-1, 3])
def test_a_split_that_leaves_nothing_to_one_part_is_refused(tmp_path: Path, split: int) -> None:
    loaded = load("reference", save(lookup(), tmp_path / "m.onnx"))
    with pytest.raises(ValueError, match="split must be 0 to 2"):
        loaded.infer({"input_ids": np.zeros((1, 3), np.int64)}, split)
