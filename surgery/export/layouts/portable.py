"""A graph of standard operators with a data file of its own: what ships, and any runtime reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.staging import refuse_inside, refuse_occupied
from surgery.export.bind import bind, refuse_overflow
from surgery.export.expressions import Cast, Expression
from surgery.export.fold import Expressions, fold
from surgery.export.layouts.interface import Layout, Request, Stages, Written
from surgery.export.write import write_folder


class Portable(Layout):
    """`model.onnx` and `model.onnx.data` in a new folder."""

    name: ClassVar[str] = "portable"

    def folder(self, model_dir: Path, output: Path | None) -> Path:
        folder = output or model_dir.with_name(f"{model_dir.name}-onnx")
        refuse_inside(folder.absolute(), model_dir)
        refuse_occupied(folder.absolute())
        return folder

    def write(self, model: Any, request: Request, stage: Stages) -> Written:
        stage("bind")
        expressions = fold(model)
        bound = bind(model, expressions, request.checkpoint)
        if any(isinstance(e, Cast) and e.to == "float16" for e in bound.values()):
            refuse_overflow(bound, request.checkpoint)
        _fill(model, bound, request.checkpoint)
        stage("write")
        return Written(write_folder(model, bound, request, stage), bound)


def _fill(model: Any, bound: Expressions, checkpoint: Checkpoint) -> None:
    import onnx_ir

    for name, expression in bound.items():
        value = model.graph.initializers[name]
        value.const_value = onnx_ir.LazyTensor(
            _reader(expression, checkpoint, name), dtype=value.dtype, shape=value.shape, name=name
        )


def _reader(expression: Expression, checkpoint: Checkpoint, name: str) -> Any:
    import onnx_ir

    return lambda: onnx_ir.tensor(expression.read(checkpoint), name=name)
