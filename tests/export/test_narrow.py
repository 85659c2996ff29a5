"""Arithmetic in bfloat16 gives PyTorch's numbers in ONNX Runtime, which has none of its own."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from surgery.export.narrow import compute_wide

BF16 = TensorProto.BFLOAT16


def graph(operator: str) -> onnx.ModelProto:
    """z = float32(bf16(x) ∘ bf16(y)), reshaped on the way: only arithmetic is at stake."""
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=BF16),
        helper.make_node("Cast", ["y"], ["b"], to=BF16),
        helper.make_node(operator, ["a", "b"], ["c"]),
        helper.make_node("Reshape", ["c", "flat"], ["d"]),
        helper.make_node("Cast", ["d"], ["z"], to=TensorProto.FLOAT),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [40]) for n in "xyz"]
    flat = helper.make_tensor("flat", TensorProto.INT64, [1], [-1])
    made = helper.make_graph(nodes, "g", ports[:2], ports[2:], [flat])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize("operator", ["Mul", "Add", "Sub", "Div"])
def test_the_numbers_are_pytorchs(operator: str) -> None:
    import torch

    model = onnx_ir.from_proto(graph(operator))
    compute_wide(model.graph)
    proto = onnx_ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    x, y = np.random.default_rng(0).normal(size=(2, 40)).astype(np.float32)
    [found] = session.run(None, {"x": x, "y": y})
    a, b = (torch.from_numpy(array).bfloat16() for array in (x, y))
    expected = getattr(torch, operator.lower())(a, b).float().numpy()
    np.testing.assert_array_equal(found, expected)


def test_onnx_runtime_has_no_such_arithmetic_itself() -> None:
    """When it has, this file and what it tests can go."""
    with pytest.raises(Exception, match="Mul"):
        onnxruntime.InferenceSession(graph("Mul").SerializeToString())
