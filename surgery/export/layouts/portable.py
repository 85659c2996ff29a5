"""A graph of standard operators with a data file of its own: what ships, and any runtime reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from surgery.checkpoint.parallel import Progress
from surgery.checkpoint.staging import refuse_inside, refuse_occupied
from surgery.export.bind import bind
from surgery.export.fold import fold
from surgery.export.layouts.interface import Layout, Request, Stages, Written
from surgery.export.optimise import optimise
from surgery.export.tied import share_tied
from surgery.export.write import write_folder


class Portable(Layout):
    """`model.onnx` and `model.onnx.data` in a new folder."""

    name: ClassVar[str] = "portable"

    def folder(self, model_dir: Path, output: Path | None) -> Path:
        folder = output or model_dir.with_name(f"{model_dir.name}-onnx")
        refuse_inside(folder.absolute(), model_dir)
        refuse_occupied(folder.absolute())
        return folder

    def write(
        self, model: Any, request: Request, stage: Stages, progress: Progress | None = None
    ) -> Written:
        stage("optimise")
        expressions = fold(model)
        if not request.quantize:  # onnxruntime quantises MatMul, and no Gemm
            share_tied(model, expressions)
        optimise(model, expressions)
        stage("bind")
        bound = bind(model, expressions, request.checkpoint)
        return Written(write_folder(model, bound, request, stage, progress), bound)
