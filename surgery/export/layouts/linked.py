"""A graph alone, whose initializers are byte ranges of the checkpoint's own safetensors.

ONNX external data and safetensors are both raw, little-endian and row-major: no weight is copied.
What an initializer would need beside its bytes, the graph does: a Cast of bf16 and f16 storage, a
Concat of what the model joins, and `com.microsoft::FusedMatMul` with transB for y = Wx, which
spares ONNX Runtime to transpose W when it loads the graph.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.parallel import Progress
from surgery.errors import OutputError
from surgery.export.bind import bind, refuse_overflow
from surgery.export.expressions import (
    Cast,
    Concat,
    Expression,
    Expressions,
    Stack,
    Tensor,
    Transpose,
)
from surgery.export.fold import fold
from surgery.export.layouts.interface import Layout, Request, Stages, Written
from surgery.export.write import place_beside

_MICROSOFT = "com.microsoft"


class Linked(Layout):
    """`model.onnx` beside the shards it points into, made without reading a weight."""

    name: ClassVar[str] = "linked"

    def folder(self, model_dir: Path, output: Path | None) -> Path:
        if output is not None and output.resolve() != model_dir.resolve():
            raise OutputError(
                f"{output}: a linked model lies in the folder of the shards it points into; leave "
                f"--output out, or name {model_dir}"
            )
        return model_dir

    def write(
        self, model: Any, request: Request, stage: Stages, progress: Progress | None = None
    ) -> Written:
        refuse_links(request.checkpoint)
        stage("bind")
        bound = link(model, request.checkpoint)
        stage("write")
        return Written(place_beside(model, bound, request), bound)


def refuse_links(checkpoint: Checkpoint) -> None:
    """Raises `OutputError` for shards that are links."""
    for shard in links(checkpoint):
        raise OutputError(
            f"{checkpoint.root / shard}: is a link, which ONNX tools refuse as external data; "
            "copy the file, or export with --layout portable"
        )


def links(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The shards that are links, symbolic or hard: ONNX tools refuse those as external data."""
    facts = {shard: (checkpoint.root / shard).lstat() for shard in checkpoint.headers}
    return tuple(s for s, f in facts.items() if stat.S_ISLNK(f.st_mode) or f.st_nlink > 1)


def link(model: Any, checkpoint: Checkpoint) -> Expressions:
    """Makes every parameter of the captured `model` a byte range of a shard, in place.

    Returns what each initializer the graph had is made of, in checkpoint tensors. Raises what
    `bind` raises, and `OnnxError` where a weight does not fit the float16 the graph computes in.
    """
    expressions = fold(model)
    _fuse(model, expressions)
    bound = bind(model, expressions, checkpoint)
    if any(isinstance(e, Cast) and e.to == "float16" for e in bound.values()):
        refuse_overflow(bound, checkpoint)
    emitter = _Emitter(model.graph, checkpoint)
    for name, expression in bound.items():
        emitter.replace(name, expression)
    return bound


def _fuse(model: Any, expressions: Expressions) -> None:
    """MatMul by a transposed initializer becomes FusedMatMul by the matrix itself."""
    import onnx_ir

    graph = model.graph
    transposed = {n: e.of for n, e in expressions.items() if isinstance(e, Transpose)}
    for name, of in transposed.items():
        value, matrix = graph.initializers[name], _matrix(graph, name, of, expressions)
        for node, position in list(value.uses()):
            if (node.op_type, position) != ("MatMul", 1):
                continue
            fused = onnx_ir.node(
                "FusedMatMul",
                [node.inputs[0], matrix],
                {"transB": 1},
                domain=_MICROSOFT,
                name=node.name,
            )
            new, old = fused.outputs[0], node.outputs[0]
            new.name, new.shape, new.type = old.name, old.shape, old.type
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            graph.insert_before(node, fused)
            graph.remove(node, safe=True)
            graph.opset_imports[_MICROSOFT] = 1
    _drop_unread(graph, expressions)


def _drop_unread(graph: Any, expressions: Expressions) -> None:
    """Drops initializers that nothing reads; every node is read, so there is no need to look."""
    for name in list(expressions):
        if not graph.initializers[name].uses():
            del graph.initializers[name], expressions[name]


def _matrix(graph: Any, name: str, of: Expression, expressions: Expressions) -> Any:
    """The initializer that is `of`, of which `name` is the transpose."""
    import onnx_ir

    for other, found in expressions.items():
        if found == of:
            return graph.initializers[other]
    transposed = graph.initializers[name]
    rows, columns = transposed.shape.numpy()
    made = onnx_ir.Value(
        name=f"{name}.T", shape=onnx_ir.Shape((columns, rows)), type=transposed.type
    )
    made.const_value = transposed.const_value
    graph.register_initializer(made)
    expressions[made.name] = of
    return made


class _Emitter:
    """Puts external initializers, and the nodes that make of them what the graph reads, into it."""

    def __init__(self, graph: Any, checkpoint: Checkpoint) -> None:
        self._graph, self._checkpoint = graph, checkpoint
        self._first = graph[0]
        self._made: dict[Expression, Any] = {}

    def replace(self, name: str, expression: Expression) -> None:
        """What reads initializer `name` reads `expression` from here on."""
        old = self._graph.initializers.pop(name)
        if isinstance(expression, Cast) and isinstance(expression.of, Tensor):
            self._look_up(old, self._value(expression.of))
        if old.uses():
            old.replace_all_uses_with(self._value(expression))

    def _look_up(self, table: Any, stored: Any) -> None:
        """Lookups in `table` take rows as they are stored, and cast those: ONNX Runtime would cast
        the whole table when it loads the graph, and keep both."""
        import onnx_ir

        for node, position in list(table.uses()):
            if (node.op_type, position) != ("Gather", 0):
                continue
            node.replace_input_with(0, stored)
            rows = node.outputs[0]
            users = list(rows.uses())
            cast = onnx_ir.node("Cast", [rows], {"to": table.dtype}, name=f"{node.name}/Cast")
            value = cast.outputs[0]
            value.name, value.shape, value.type = rows.name, rows.shape, rows.type
            rows.name, rows.type = f"{rows.name}/stored", stored.type
            for user, index in users:
                user.replace_input_with(index, value)
            self._graph.insert_after(node, cast)

    def _value(self, expression: Expression) -> Any:
        if expression not in self._made:
            self._made[expression] = self._make(expression)
        return self._made[expression]

    def _make(self, expression: Expression) -> Any:
        match expression:
            case Tensor(name):
                return self._external(name)
            case Cast(of, to):
                return self._cast(of, to)
            case Transpose(of):
                rank = len(of.shape(self._checkpoint))
                perm = [*range(rank - 2), rank - 1, rank - 2]
                return self._node("Transpose", [self._value(of)], of, perm=perm)
            case Concat(parts, axis):
                return self._node("Concat", map(self._value, parts), expression, axis=axis)
            case Stack(parts):
                inner = [self._node("Unsqueeze", [self._value(p), self._zero()], p) for p in parts]
                return self._node("Concat", inner, expression, axis=0)
        raise AssertionError(f"a graph has no {expression.kind} of parameters")

    def _cast(self, of: Expression, to: str) -> Any:
        """Each tensor is cast for itself: joined ones may be stored in unlike types."""
        match of:
            case Tensor():
                import onnx_ir

                source = self._value(of)
                wanted = onnx_ir.DataType.from_numpy(Cast(of, to).dtype(self._checkpoint))
                if source.dtype == wanted:
                    return source
                return self._node("Cast", [source], of, to=wanted)
            case Transpose(inner):
                return self._value(Transpose(Cast(inner, to)))
            case Concat(parts, axis):
                return self._value(Concat(tuple(Cast(part, to) for part in parts), axis))
            case Stack(parts):
                return self._value(Stack(tuple(Cast(part, to) for part in parts)))
        raise AssertionError(f"a graph has no cast of a {of.kind}")

    def _external(self, tensor: str) -> Any:
        import onnx_ir

        info = self._checkpoint.info(tensor)
        dtype = onnx_ir.DataType.from_numpy(Tensor(tensor).dtype(self._checkpoint))
        shape = onnx_ir.Shape(info.shape)
        value = onnx_ir.Value(name=tensor, shape=shape, type=onnx_ir.TensorType(dtype))
        value.const_value = onnx_ir.ExternalTensor(
            info.file, info.begin, info.nbytes, dtype, shape=shape, name=tensor
        )
        self._graph.register_initializer(value)
        return value

    def _node(self, kind: str, inputs: Iterable[Any], of: Expression, **attributes: Any) -> Any:
        import onnx_ir

        node = onnx_ir.node(kind, list(inputs), attributes)
        node.name = f"{'+'.join(of.tensors()[:2])}/{kind}_{len(self._made) + 1}"
        node.outputs[0].name = node.name
        self._graph.insert_before(self._first, node)
        return node.outputs[0]

    def _zero(self) -> Any:
        import numpy as np
        import onnx_ir

        name = "axis_0"
        if name not in self._graph.initializers:
            tensor = onnx_ir.tensor(np.array([0], np.int64), name=name)
            self._graph.register_initializer(onnx_ir.Value(name=name, const_value=tensor))
        return self._graph.initializers[name]
