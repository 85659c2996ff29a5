"""Checkpoint to ONNX: capture the graph, bind the checkpoint's numbers, check, put in place."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery import process
from surgery.errors import InputError, quote
from surgery.export.layouts import LAYOUTS
from surgery.export.tasks import CACHED, TASKS, Task, choose_task, default_task, find_task
from surgery.registry import suggest

__all__ = [
    "CACHED",
    "LAYOUTS",
    "TASKS",
    "ExportResult",
    "Task",
    "choose_task",
    "default_task",
    "export",
    "export_graph",
    "find_task",
]

DEFAULT_OPSET = 20
OPSETS = range(18, 24)
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class ExportResult:
    """What was written: `sizes` maps each file of the folder `output` to its bytes.

    `bound` is the number of initializers made of checkpoint tensors, `unused` the checkpoint
    tensors the graph does not read; `cached`: the graph was at hand; `seconds` is wall time.
    """

    output: Path
    model: Path
    sizes: dict[str, int]
    task: str
    opset: int
    dtype: str
    layout: str
    bound: int
    unused: tuple[str, ...]
    cached: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        fields = {**vars(self), "output": str(self.output), "model": str(self.model)}
        return {**fields, "unused": list(self.unused)}


def export(
    model_dir: Path,
    output: Path | None = None,
    *,
    task: str | None = None,
    opset: int | None = None,
    dtype: str = "float32",
    layout: str = "portable",
    limits: process.Limits | None = None,
    stage: Callable[[str], None] | None = None,
    report: Path | None = None,
) -> ExportResult:
    """Export the checkpoint `model_dir`; the graph is captured in a child process, with limits.

    `task` defaults to the family's; `dtype` (`float32` or `float16`) is what the graph computes
    in, whatever the weights are stored in; `output` to the layout's own place; with `report`,
    torch's own report goes into that folder. Raises
    `OutputError`, `CheckpointError`, `ArchitectureError` or `OnnxError` for what the caller gave,
    `ExportError` when the exporter fails; nothing is left behind then.
    """
    from surgery.checkpoint import Checkpoint
    from surgery.export.bind import unused
    from surgery.export.graphs import Wanted, captured
    from surgery.export.layouts.interface import MODEL, Request

    started = time.monotonic()
    stage = stage or _silent
    version = DEFAULT_OPSET if opset is None else opset
    _check_options(version, dtype, layout)
    stage("load")
    checkpoint = Checkpoint.open(model_dir)
    wanted = choose_task(model_dir, task)
    kind = LAYOUTS[layout]()
    request = Request(checkpoint, kind.folder(model_dir, output), wanted.name, version, dtype)
    graph, cached = captured(Wanted(model_dir, wanted.name, version, dtype), limits, stage, report)
    written = kind.write(graph, request, stage)
    return ExportResult(
        output=request.output,
        model=request.output / MODEL,
        sizes=written.sizes,
        task=wanted.name,
        opset=version,
        dtype=dtype,
        layout=layout,
        bound=len(written.bound),
        unused=unused(checkpoint, written.bound),
        cached=cached,
        seconds=time.monotonic() - started,
    )


def export_graph(
    model_dir: Path,
    file: Path,
    *,
    task: str,
    limits: process.Limits | None = None,
) -> None:
    """Write the linked graph of a checkpoint alone to `file`: its external data lies in
    `model_dir`, into which nothing is written. Raises what `export` raises."""
    import onnx_ir

    from surgery.checkpoint import Checkpoint
    from surgery.export.graphs import Wanted, captured
    from surgery.export.layouts.linked import link

    checkpoint = Checkpoint.open(model_dir)
    graph, _ = captured(Wanted(model_dir, task, DEFAULT_OPSET, "float32"), limits)
    link(graph, checkpoint)
    file.write_bytes(onnx_ir.to_proto(graph).SerializeToString(deterministic=True))


def _silent(stage: str) -> None:
    """For callers without a use for stages."""


def _check_options(opset: int, dtype: str, layout: str) -> None:
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {quote(layout)}{suggest(layout, LAYOUTS)}")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {quote(dtype)}; known: {', '.join(DTYPES)}")
    if opset not in OPSETS:
        raise InputError(f"opset {opset}; expected {OPSETS.start} to {OPSETS.stop - 1}")
