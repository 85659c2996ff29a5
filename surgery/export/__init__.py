"""Checkpoint to ONNX: capture the graph, bind the checkpoint's numbers, check, put in place."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery import process
from surgery.checkpoint.parallel import Progress
from surgery.errors import InputError, quote
from surgery.export.layouts import LAYOUTS
from surgery.export.layouts.interface import CHILD_LIMITS, MODEL, Request, Stages
from surgery.export.quantize import QUANTIZATIONS
from surgery.export.tasks import CACHED, TASKS, Task, choose_task, default_task, find_task
from surgery.registry import suggest

__all__ = [
    "CACHED",
    "LAYOUTS",
    "QUANTIZATIONS",
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
OPSETS = range(18, 26)
"""From the one torch's exporter writes to the newest that onnxscript converts its graphs to."""
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class ExportResult:
    """What was written: `sizes` maps each file of the folder `output` to its bytes.

    `bound` is the number of initializers made of checkpoint tensors, `unused` the checkpoint
    tensors the graph does not read; `cached`: the graph was at hand; `seconds` is wall time, and
    `stages` that of each stage.
    """

    output: Path
    model: Path
    sizes: dict[str, int]
    task: str
    opset: int
    dtype: str
    layout: str
    quantize: str | None
    bound: int
    unused: tuple[str, ...]
    cached: bool
    seconds: float
    stages: dict[str, float]

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
    quantize: str | None = None,
    limits: process.Limits | None = None,
    stage: Stages | None = None,
    progress: Progress | None = None,
    report: Path | None = None,
) -> ExportResult:
    """Export the checkpoint `model_dir`; child processes capture and check the graph, with limits.

    `task` defaults to the family's; `dtype` (`float32` or `float16`) is what the graph computes
    in, whatever the weights are stored in; `output` to the layout's own place; `quantize` is None
    or `int8`, of portable float32 models. `stage` is told what begins, `progress` of bytes; with
    `report`, torch's own report goes into that folder. Raises
    `OutputError`, `CheckpointError`, `ArchitectureError` or `OnnxError` for what the caller gave,
    `ExportError` when the exporter fails; nothing is left behind then.
    """
    from surgery.checkpoint import Checkpoint
    from surgery.export.bind import unused
    from surgery.export.graphs import Wanted, captured

    watch = _Stopwatch(stage)
    version = DEFAULT_OPSET if opset is None else opset
    _check_options(version, dtype, layout, quantize)
    watch("load")
    checkpoint = Checkpoint.open(model_dir)
    wanted = choose_task(model_dir, task)
    kind = LAYOUTS[layout]()
    request = Request(
        checkpoint,
        kind.folder(model_dir, output),
        wanted.name,
        version,
        dtype,
        quantize,
        limits or CHILD_LIMITS,
    )
    graph, cached = captured(Wanted(model_dir, wanted.name, version, dtype), limits, watch, report)
    written = kind.write(graph, request, watch, progress)
    stages = watch.stop()
    return ExportResult(
        output=request.output,
        model=request.output / MODEL,
        sizes=written.sizes,
        task=wanted.name,
        opset=version,
        dtype=dtype,
        layout=layout,
        quantize=quantize,
        bound=len(written.bound),
        unused=unused(checkpoint, written.bound),
        cached=cached,
        seconds=sum(stages.values()),
        stages=stages,
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


class _Stopwatch:
    """Tells `stage` what begins, and keeps how long each took."""

    def __init__(self, stage: Stages | None) -> None:
        self._stage, self._began = stage, time.monotonic()
        self._name, self._seconds = "", dict[str, float]()

    def __call__(self, name: str) -> None:
        self.stop()
        self._name = name
        if self._stage is not None:
            self._stage(name)

    def stop(self) -> dict[str, float]:
        """Seconds of each stage, of which the last has ended now."""
        now = time.monotonic()
        if self._name:
            self._seconds[self._name] = now - self._began
        self._name, self._began = "", now
        return self._seconds


def _check_options(opset: int, dtype: str, layout: str, quantize: str | None) -> None:
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {quote(layout)}{suggest(layout, LAYOUTS)}")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {quote(dtype)}; known: {', '.join(DTYPES)}")
    if opset not in OPSETS:
        raise InputError(f"opset {opset}; expected {OPSETS.start} to {OPSETS.stop - 1}")
    if quantize is None:
        return
    if quantize not in QUANTIZATIONS:
        raise InputError(f"cannot quantize to {quote(quantize)}; known: {', '.join(QUANTIZATIONS)}")
    if (layout, dtype) != ("portable", "float32"):
        raise InputError(
            f"a {layout} {dtype} model cannot be quantized; leave --layout and --dtype out"
        )
