"""What float type an ONNX graph computes in: the one its matrix products hold their weights in."""

from __future__ import annotations

import math
from typing import Any

from surgery.runtimes.interface import FLOAT32

_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "Conv", "Einsum", "Attention")
_LAYOUT = ("Transpose", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Concat", "Slice", "Split")
"""Operators that hand a weight on as it is."""


def compute_dtype(model: Any) -> str:
    """`float32`, `float16` or `bfloat16`: of a ModelProto's weights that matrix products take, the
    type of most elements, after whatever casts lie between.

    Most, since a graph in float16 leaves a small product, of rotary angles, in float32; and one
    float32 graph with a single narrow product is still held to float32. Without any, float32.
    """
    from onnx import TensorProto

    names = {TensorProto.FLOAT: FLOAT32, TensorProto.FLOAT16: "float16"}
    names[TensorProto.BFLOAT16] = "bfloat16"
    weights = {t.name: (t.data_type, math.prod(t.dims)) for t in model.graph.initializer}
    held = dict.fromkeys(names, 0)
    for node in model.graph.node:
        found = [weights[name] for name in node.input if name in weights]
        if node.op_type in _PRODUCTS:
            for kind, count in found:
                held[kind] = held.get(kind, 0) + count
        elif found and (node.op_type == "Cast" or node.op_type in _LAYOUT):
            kind = _target(node) if node.op_type == "Cast" else found[0][0]
            weights |= dict.fromkeys(node.output, (kind, sum(count for _, count in found)))
    # Of equals the first, which is float32.
    return names[max(names, key=lambda kind: held[kind])]


def _target(node: Any) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "to"), 0)
