"""What a graph does to parameters alone is taken out of it, as an expression that says the same."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx_ir
import pytest

from surgery.export.capture import PARAMETERS, placeholder
from surgery.export.expressions import Item, Tensor, Transpose
from surgery.export.fold import fold

FLOAT = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)


def parameter(name: str, *shape: int) -> Any:
    value = onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=FLOAT)
    value.const_value = placeholder(value)
    return value


def constant(name: str, *numbers: int) -> Any:
    tensor = onnx_ir.tensor(np.array(numbers, np.int64), name=name)
    return onnx_ir.Value(name=name, const_value=tensor)


def model(nodes: list[Any], initializers: list[Any], *parameters: str) -> Any:
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape(["rows", 4]), type=FLOAT)
    for number, node in enumerate(nodes):
        for index, value in enumerate(node.outputs):
            value.name = f"v{number}.{index}"
        for index, value in enumerate(node.inputs):
            if value.name == "x":
                node.replace_input_with(index, x)
    outputs = nodes[-1].outputs
    graph = onnx_ir.Graph([x], outputs, nodes=nodes, initializers=initializers, name="g")
    made = onnx_ir.Model(graph, ir_version=10)
    made.metadata_props[PARAMETERS] = json.dumps({name: [name] for name in parameters})
    return made


def transposed(of: Any, *perm: int) -> Any:
    return onnx_ir.node("Transpose", [of], {"perm": list(perm)})


def test_a_transposed_parameter_is_an_initializer_of_its_own() -> None:
    weight = parameter("w", 3, 4)
    turn = transposed(weight, 1, 0)
    product = onnx_ir.node("MatMul", [onnx_ir.Value(name="x"), turn.outputs[0]])
    made = model([turn, product], [weight], "w")
    assert fold(made) == {"w.T": Transpose(Tensor("w"))}
    assert [node.op_type for node in made.graph] == ["MatMul"]
    assert list(made.graph.initializers) == ["w.T"]
    assert tuple(made.graph.initializers["w.T"].shape) == (4, 3)


def test_two_transpositions_give_the_parameter_back() -> None:
    weight = parameter("w", 4, 3)
    once = transposed(weight, 1, 0)
    twice = transposed(once.outputs[0], 1, 0)
    product = onnx_ir.node("MatMul", [onnx_ir.Value(name="x"), twice.outputs[0]])
    assert list(fold(model([once, twice, product], [weight], "w")).values()) == [Tensor("w")]


def test_experts_taken_from_a_stack_are_items_of_it() -> None:
    stack, axes = parameter("experts", 2, 4, 4), constant("axes", 0)
    split = onnx_ir.node("Split", [stack], {"axis": 0}, num_outputs=2)
    parts = [onnx_ir.node("Squeeze", [value, axes]) for value in split.outputs]
    first = onnx_ir.node("MatMul", [onnx_ir.Value(name="x"), parts[0].outputs[0]])
    second = onnx_ir.node("MatMul", [first.outputs[0], parts[1].outputs[0]])
    made = model([split, *parts, first, second], [stack, axes], "experts")
    stacked = Tensor("experts")
    assert fold(made) == {"experts.0": Item(stacked, 0), "experts.1": Item(stacked, 1)}
    assert [node.op_type for node in made.graph] == ["MatMul", "MatMul"]


@pytest.mark.parametrize("perm", [(0, 2, 1), (1, 0, 2)])
def test_only_the_last_two_axes_are_transposed(perm: tuple[int, ...]) -> None:
    weight = parameter("w", 2, 4, 4)
    turn = transposed(weight, *perm)
    product = onnx_ir.node("MatMul", [onnx_ir.Value(name="x"), turn.outputs[0]])
    found = fold(model([turn, product], [weight], "w"))
    assert found == ({"w.T": Transpose(Tensor("w"))} if perm == (0, 2, 1) else {"w": Tensor("w")})


def test_buffers_stay_what_the_graph_makes_of_them() -> None:
    buffer = parameter("buffer", 3, 4)
    turn = transposed(buffer, 1, 0)
    product = onnx_ir.node("MatMul", [onnx_ir.Value(name="x"), turn.outputs[0]])
    made = model([turn, product], [buffer])
    assert fold(made) == {}
    assert [node.op_type for node in made.graph] == ["Transpose", "MatMul"]
