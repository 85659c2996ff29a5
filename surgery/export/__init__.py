"""Checkpoint to ONNX: capture the graph, bind the checkpoint's numbers, check, put in place."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery import process
from surgery.errors import ExportError, InputError, quote
from surgery.export.tasks import CACHED, TASKS, Task, choose_task, default_task, find_task

__all__ = [
    "CACHED",
    "LAYOUTS",
    "TASKS",
    "ExportResult",
    "Task",
    "choose_task",
    "default_task",
    "export",
    "export_in_child",
    "find_task",
]

LAYOUTS = ("portable",)
_DTYPES = ("float32", "float16")
_OPSETS = range(18, 24)
_INNER = "onnx"


@dataclass(frozen=True)
class ExportResult:
    """What was written: `sizes` maps each file of the folder `output` to its bytes.

    `bound` is the number of initializers that are checkpoint tensors, `unused` the checkpoint
    tensors the graph does not read; `seconds` is wall time.
    """

    output: Path
    model: Path
    sizes: dict[str, int]
    task: str
    opset: int
    dtype: str
    bound: int
    unused: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        fields = {**vars(self), "output": str(self.output), "model": str(self.model)}
        return {**fields, "unused": list(self.unused)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ExportResult:
        paths = {"output": Path(fields["output"]), "model": Path(fields["model"])}
        return cls(**{**fields, **paths, "unused": tuple(fields["unused"])})


def export(
    model_dir: Path,
    output: Path,
    *,
    task: str | None = None,
    opset: int | None = None,
    dtype: str = "float32",
    layout: str = "portable",
) -> ExportResult:
    """Export the checkpoint `model_dir` to the new folder `output`, in this process.

    `task` defaults to the family's; `dtype` (`float32` or `float16`) is what the graph computes
    in, whatever the weights are stored in. Raises `OutputError`, `CheckpointError`,
    `ArchitectureError` or `OnnxError` for what the caller gave, `ExportError` when the exporter
    fails; nothing is left at `output` then.
    """
    from surgery.checkpoint import Checkpoint
    from surgery.checkpoint.staging import refuse_inside, refuse_occupied
    from surgery.export.bind import bind
    from surgery.export.capture import DEFAULT_OPSET, capture
    from surgery.export.write import MODEL, write

    started = time.monotonic()
    version = DEFAULT_OPSET if opset is None else opset
    _check_options(version, dtype, layout)
    refuse_inside(output.absolute(), model_dir)
    refuse_occupied(output.absolute())
    wanted = choose_task(model_dir, task)
    graph = capture(model_dir, wanted.name, version, dtype)
    bound = bind(graph, model_dir, dtype)
    unused = sorted(set(Checkpoint.open(model_dir).tensors) - set(bound.values()))
    facts = {"task": wanted.name, "opset": version, "dtype": dtype, "layout": layout}
    sizes = write(graph, output, model_dir, {**facts, "unused": unused})
    return ExportResult(
        output=output,
        model=output / MODEL,
        sizes=sizes,
        task=wanted.name,
        opset=version,
        dtype=dtype,
        bound=len(bound),
        unused=tuple(unused),
        seconds=time.monotonic() - started,
    )


def export_in_child(
    model_dir: Path,
    output: Path,
    *,
    task: str | None = None,
    opset: int | None = None,
    dtype: str = "float32",
    layout: str = "portable",
    limits: process.Limits | None = None,
) -> ExportResult:
    """`export` in a child process with limits: the caller never imports torch.

    Raises what `export` raises; a crash, a timeout or too little memory is an `ExportError`.
    """
    from surgery.checkpoint import Staging

    choose_task(model_dir, task)
    bounds = limits or process.Limits(seconds=3600.0)
    # The child stages inside our own staging folder, so a killed child leaves nothing behind.
    with Staging(output, sources=(model_dir,)) as staging:
        arguments = {
            "action": "export",
            "model_dir": str(model_dir.absolute()),
            "output": str(staging.path / _INNER),
            "task": task,
            "opset": opset,
            "dtype": dtype,
            "layout": layout,
        }
        with tempfile.TemporaryDirectory(prefix="surgery-export-") as scratch:
            ending = process.run("surgery.export.worker", arguments, Path(scratch), bounds)
        result = ending.value(f"{model_dir}: the export", ExportError)
        for file in (staging.path / _INNER).iterdir():
            file.rename(staging.path / file.name)
        (staging.path / _INNER).rmdir()
        staging.commit()
    paths = {"output": str(output), "model": str(output / Path(result["model"]).name)}
    return ExportResult.from_json({**result, **paths})


def _check_options(opset: int, dtype: str, layout: str) -> None:
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {quote(layout)}; known: {', '.join(LAYOUTS)}")
    if dtype not in _DTYPES:
        raise InputError(f"unknown dtype {quote(dtype)}; known: {', '.join(_DTYPES)}")
    if opset not in _OPSETS:
        raise InputError(f"opset {opset}; expected {_OPSETS.start} to {_OPSETS.stop - 1}")
