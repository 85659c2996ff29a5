"""What a captured graph does to its parameters before it uses them, taken out of the graph.

Exporters write y = Wx as MatMul(x, Transpose(W)), and unpack stacks of experts with Split and
Squeeze. Folding makes an initializer of each such result: an expression in parameters, which a
layout then stores, or builds in its own way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from surgery.export.capture import PARAMETERS, placeholder
from surgery.export.expressions import Expression, Expressions, Tensor, item, transpose


def fold(model: Any) -> Expressions:
    """Folds the `onnx_ir.Model` in place; returns every unbound initializer's expression."""
    parameters = json.loads(model.metadata_props[PARAMETERS])
    known: Expressions = {n: Tensor(n) for n in model.graph.initializers if n in parameters}
    for node in list(model.graph):
        source = node.inputs[0] if node.inputs else None
        if source is not None and source.name in known:
            for result in _results(node, source, known[source.name]):
                known[result.name] = result.expression
                result.value.replace_all_uses_with(_initializer(model.graph, source, result))
    drop_unused(model, known)
    return known


def drop_unused(model: Any, expressions: Expressions) -> None:
    """Drops nodes without effect, and initializers that nothing reads."""
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)
    for name in set(expressions) - set(model.graph.initializers):
        del expressions[name]


@dataclass(frozen=True)
class _Result:
    """A computed `value` that only rearranges an initializer, and what it is called as one."""

    value: Any
    name: str
    expression: Expression
    shape: tuple[int, ...]


def _results(node: Any, source: Any, known: Expression) -> Iterator[_Result]:
    shape = tuple(source.shape.numpy())
    if node.op_type == "Transpose":
        perm = tuple(node.attributes["perm"].as_ints())
        rank = len(perm)
        if rank >= 2 and perm == (*range(rank - 2), rank - 1, rank - 2):
            swapped = (*shape[:-2], shape[-1], shape[-2])
            yield _Result(node.outputs[0], f"{source.name}.T", transpose(known), swapped)
    if node.op_type == "Split" and _along_first(node):
        for index, value in enumerate(node.outputs):
            for user in value.consumers():
                if user.op_type == "Squeeze" and _along_first(user):
                    name = f"{source.name}.{index}"
                    yield _Result(user.outputs[0], name, item(known, index), shape[1:])


def _along_first(node: Any) -> bool:
    """Whether a Split gives the entries of the first axis, or a Squeeze removes it."""
    from onnx_ir.convenience import get_const_tensor

    if node.op_type == "Split":
        axis = node.attributes.get("axis")
        first = axis is None or axis.as_int() == 0
        return first and bool(node.inputs[0].shape[0] == len(node.outputs))
    axes = get_const_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
    return axes is not None and axes.numpy().reshape(-1).tolist() == [0]


def _initializer(graph: Any, source: Any, result: _Result) -> Any:
    import onnx_ir

    if result.name not in graph.initializers:
        shape = onnx_ir.Shape(result.shape)
        made = onnx_ir.Value(name=result.name, shape=shape, type=source.type)
        made.const_value = placeholder(made)
        graph.register_initializer(made)
    return graph.initializers[result.name]
