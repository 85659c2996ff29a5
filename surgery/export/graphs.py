"""The captured graph of a checkpoint: from the cache, or traced in a child process."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery import process
from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.checkpoint.receipt import canonical
from surgery.errors import ExportError
from surgery.export import cache
from surgery.export.layouts.interface import Stages

FORMAT = 3
"""Raised whenever `capture` gives another graph than it did."""
CAPTURED = "captured.onnx"
_PACKAGES = ("weight-surgery", "torch", "transformers", "onnx", "onnx_ir", "onnxscript")
_UNREAD = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Fields of a config that the graph does not follow: where it is from, and the type on disk."""


@dataclass(frozen=True)
class Wanted:
    """What a captured graph follows from: the checkpoint's config and sizes, and the options."""

    model_dir: Path
    task: str
    opset: int
    dtype: str

    def facts(self) -> dict[str, Any]:
        """What an entry says of itself."""
        arch = identify(Checkpoint.open(self.model_dir))
        return {
            "family": arch.family,
            "layers": arch.layers,
            "task": self.task,
            "opset": self.opset,
            "dtype": self.dtype,
        }

    def key(self) -> str:
        """The hex digest that names the entry."""
        checkpoint = Checkpoint.open(self.model_dir)
        config = {name: v for name, v in checkpoint.config.items() if name not in _UNREAD}
        roles = {role.role for role in identify(checkpoint).roles.values()}
        everything = {
            **self.facts(),
            "config": config,
            "pooler": "pooler" in roles,
            "versions": cache.versions(_PACKAGES),
            "format": FORMAT,
        }
        return hashlib.sha256(canonical(everything)).hexdigest()


def captured(
    wanted: Wanted,
    limits: process.Limits | None = None,
    stage: Stages = lambda name: None,
    report: Path | None = None,
) -> tuple[Any, bool]:
    """The captured `onnx_ir.Model`, and whether it was cached; see `capture.capture`.

    With `report` it is traced anew, and torch's own report goes into that folder. Raises what
    `capture` raises; a crash, a timeout or too little memory is an `ExportError`.
    """
    import onnx
    import onnx_ir

    key = wanted.key()
    graph = None if report else cache.load(key)
    cached = graph is not None
    if graph is None:
        stage("trace")
        graph = _trace(wanted, limits or process.Limits(seconds=3600.0), report)
        cache.store(key, wanted.facts(), graph)
    return onnx_ir.from_proto(onnx.load_model_from_string(graph)), cached


def _trace(wanted: Wanted, limits: process.Limits, report: Path | None) -> bytes:
    with tempfile.TemporaryDirectory(prefix="surgery-capture-") as scratch:
        file = Path(scratch) / CAPTURED
        arguments = {
            **asdict(wanted),
            "action": "capture",
            "model_dir": str(wanted.model_dir.absolute()),
            "report": str(report.absolute()) if report else None,
            "output": str(file),
        }
        ending = process.run("surgery.export.worker", arguments, Path(scratch), limits)
        ending.value(f"{wanted.model_dir}: the export failed at stage trace", ExportError)
        return file.read_bytes()
