"""Arithmetic in bfloat16, as a model may ask for whatever it computes in, made float32's.

ONNX Runtime's CPU provider has no bfloat16 kernels of these operators. PyTorch's CPU computes them
in float32 and rounds the result, so that is what the graph says instead: the same numbers.
"""

from __future__ import annotations

from typing import Any

_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Neg", "Pow", "Sqrt", "Exp", "Log", "Max", "Min", "Sum")


def compute_wide(graph: Any) -> None:
    """Casts what arithmetic nodes of an `onnx_ir.Graph` take in bfloat16 to float32, and what they
    give back, in place."""
    import onnx_ir

    narrow = onnx_ir.DataType.BFLOAT16
    for node in list(graph):
        if node.op_type in _ARITHMETIC and node.outputs[0].dtype == narrow:
            for position, value in enumerate(node.inputs):
                wide = _cast(node, value, onnx_ir.DataType.FLOAT)
                graph.insert_before(node, wide)
                node.replace_input_with(position, wide.outputs[0])
            _round(graph, node)


def _round(graph: Any, node: Any) -> None:
    """What read the node's result reads it in bfloat16."""
    import onnx_ir

    result = node.outputs[0]
    users = list(result.uses())
    rounded = _cast(node, result, onnx_ir.DataType.BFLOAT16)
    result.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    for user, position in users:
        user.replace_input_with(position, rounded.outputs[0])
    graph.insert_after(node, rounded)


def _cast(node: Any, value: Any, to: Any) -> Any:
    """A Cast of `value`, said to be traced where `node` was."""
    import onnx_ir

    cast = onnx_ir.node("Cast", [value], {"to": to}, metadata_props=dict(node.metadata_props))
    made = cast.outputs[0]
    made.shape, made.type = value.shape, onnx_ir.TensorType(to)
    return cast
