"""Small ONNX files made by hand, good ones and bad ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROWS, WIDTH = 11, 4
TABLE = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)


def lookup(ids: str = "input_ids", output: str = "logits", table: Any = TABLE) -> onnx.ModelProto:
    """ids [batch, length] to rows of `table`: the smallest graph that looks like a model."""
    gather = helper.make_node("Gather", ["table", ids], [output])
    return model([gather], [ids], output, [numpy_helper.from_array(table, "table")])


def model(
    nodes: list[Any],
    inputs: list[str],
    output: str,
    weights: list[Any],
    shape: tuple[Any, ...] = ("batch", "length", "width"),
    opset: int = 20,
) -> onnx.ModelProto:
    ids = [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "length"]) for n in inputs]
    result = helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "main", ids, [result], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def externally(proto: onnx.ModelProto, path: Path, **fields: str) -> Path:
    """Saves `proto` with its first initializer in `weights.bin`, then sets external data fields."""
    tensor = proto.graph.initializer[0]
    (path.parent / "weights.bin").write_bytes(tensor.raw_data)
    found = {
        "location": "weights.bin",
        "offset": "0",
        "length": str(len(tensor.raw_data)),
        **fields,
    }
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in found.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return save(proto, path)


def save(proto: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def endless() -> onnx.ModelProto:
    """A Loop whose condition never turns false."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_in"], ["go"]),
            helper.make_node("Add", ["state_in", "state_in"], ["state"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state_in", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Loop", ["", "always", "rows"], ["logits"], body=body),
    ]
    weights = [
        numpy_helper.from_array(TABLE, "table"),
        numpy_helper.from_array(np.array(True), "always"),
    ]
    return model(nodes, ["input_ids"], "logits", weights)


def enormous() -> onnx.ModelProto:
    """Asks for a tensor of 4 TiB while it runs."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Expand", ["rows", "size"], ["logits"]),
    ]
    weights = [
        numpy_helper.from_array(TABLE, "table"),
        numpy_helper.from_array(np.array([2**38, 1, 1, 1], np.int64), "size"),
    ]
    return model(nodes, ["input_ids"], "logits", weights, shape=("n", "b", "l", "w"))
