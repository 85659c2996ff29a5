"""What a layout does: make an ONNX graph of a captured one, and put it in its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from surgery import process
from surgery.checkpoint import LINEAGE, Checkpoint
from surgery.checkpoint.parallel import Progress
from surgery.export.expressions import Expressions

__all__ = ["LINEAGE", "MODEL", "Layout", "Request", "Stages", "Written"]

MODEL = "model.onnx"
CHILD_LIMITS = process.Limits(seconds=3600.0)
Stages = Callable[[str], None]
"""Called with the name of a stage as it begins."""


@dataclass(frozen=True)
class Request:
    """What is exported: a checkpoint for a task (a name of `TASKS`), computing in `dtype`
    (`float32` or `float16`), into the folder `output`; `quantize` is a name of `QUANTIZATIONS`,
    `limits` what each child process may use."""

    checkpoint: Checkpoint
    output: Path
    task: str
    opset: int
    dtype: str
    quantize: str | None = None
    limits: process.Limits = CHILD_LIMITS


@dataclass(frozen=True)
class Written:
    """What a layout wrote: each file of the folder with its bytes, and what every initializer is
    made of."""

    sizes: dict[str, int]
    bound: Expressions


class Layout(ABC):
    """One way to lay out an exported model."""

    name: ClassVar[str]

    @abstractmethod
    def folder(self, model_dir: Path, output: Path | None) -> Path:
        """Where files go; raises `InputError` or `OutputError` for a place they cannot go to."""

    @abstractmethod
    def write(
        self, model: Any, request: Request, stage: Stages, progress: Progress | None = None
    ) -> Written:
        """Write the captured `onnx_ir.Model`, which this may change, to `request.output`.

        `progress` is told of bytes read and written while there are many.
        """
