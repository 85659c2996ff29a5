"""Which checkpoint tensor each ONNX initializer is, proven by comparing every bit.

Names alone prove nothing: exporters fold, transpose, tie and merge equal initializers. What an
initializer should be is said by its name, by `lineage.json`, or by the node that uses it; what it
is, is found by its contents, which are recomputed from the checkpoint and compared.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from surgery.checkpoint.parallel import Progress
from surgery.export import onnxfile
from surgery.export.lineage.claims import CLAIMS, render
from surgery.export.lineage.result import Fault, Lineage, Row

__all__ = ["CLAIMS", "Fault", "Lineage", "Row", "render", "trace"]


def trace(
    onnx: Path, model: Path, progress: Progress | None = None, initializers: Path | None = None
) -> Lineage:
    """What every initializer of the main graph of `onnx` is, of the tensors of `model`.

    `initializers` is the folder in which external data lies, by default the file's own. Memory
    follows bands of 32 MiB for each core. Raises `OnnxError` for a file that `onnxfile.check`
    refuses or a malformed `lineage.json`, `CheckpointError` for a malformed checkpoint.
    """
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(onnxfile.check, onnx, initializers=initializers)
        try:
            # Imported while the child that checks the file is starting.
            from surgery.export.lineage.whole import trace_whole

            return trace_whole(onnx, model, progress, initializers)
        finally:  # whatever came of it, what the check refuses is refused
            checked.result()
