"""A matrix that a model reads both as it is and transposed: an embedding that is the head too."""

from __future__ import annotations

from typing import Any

from surgery.export.expressions import Expressions, Transpose
from surgery.export.fold import drop_unused


def share_tied(model: Any, expressions: Expressions) -> None:
    """Keeps such a matrix W once in the folded `onnx_ir.Model`, in place.

    y = xWᵀ becomes a Gemm with transB, which onnxruntime runs from W itself; a Transpose it would
    evaluate when it loads the graph, into a second copy.
    """
    stored = {expression: name for name, expression in expressions.items()}
    for name, expression in list(expressions.items()):
        if isinstance(expression, Transpose) and expression.of in stored:
            transposed = model.graph.initializers[name]
            matrix = model.graph.initializers[stored[expression.of]]
            if len(matrix.shape) == 2:
                _multiply_by(model.graph, matrix, transposed)
    drop_unused(model, expressions)


def _multiply_by(graph: Any, matrix: Any, transposed: Any) -> None:
    """Makes every MatMul by `transposed` a Gemm by `matrix` [height, width]."""
    for node, position in list(transposed.uses()):
        if (node.op_type, position) == ("MatMul", 1):
            result = _gemm(graph, node, matrix)
            old = node.outputs[0]
            result.name, result.shape, result.type = old.name, old.shape, old.type
            old.replace_all_uses_with(result, replace_graph_outputs=True)
            graph.remove(node, safe=True)


def _gemm(graph: Any, node: Any, matrix: Any) -> Any:
    """The product of the MatMul `node`, made before it; Gemm wants two axes."""
    height = matrix.shape[0]

    def make(operator: str, *inputs: Any, **attributes: Any) -> Any:
        import onnx_ir

        made = onnx_ir.node(operator, inputs, attributes, name=f"{node.name}.{operator}")
        made.outputs[0].name = made.name
        graph.insert_before(node, made)
        return made.outputs[0]

    rows = make("Flatten", node.inputs[0], axis=-1)
    product = make("Gemm", rows, matrix, transB=1)
    sizes = make("Shape", node.inputs[0], end=-1)
    return make("Reshape", product, make("Concat", sizes, _constant(graph, height), axis=0))


def _constant(graph: Any, number: int) -> Any:
    import numpy as np
    import onnx_ir

    name = f"size_{number}"
    if name not in graph.initializers:
        tensor = onnx_ir.tensor(np.array([number], np.int64), name=name)
        value = onnx_ir.Value(
            name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(value)
    return graph.initializers[name]
