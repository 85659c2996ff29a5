"""Which checkpoint tensor each ONNX initializer is, proven by comparing every bit.

Names alone prove nothing: exporters fold, transpose, tie and merge equal initializers. So a
named tensor is compared with its initializer, and an initializer no tensor is named like is
looked for by its content.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import numpy_dtype
from surgery.export import onnxfile
from surgery.export.expressions import cast
from surgery.export.external import read_tensor
from surgery.export.names import find_tensor

MIN_ELEMENTS = 64
"""Smaller tensors are not looked for by content: vectors of ones would all be each other."""


@dataclass(frozen=True)
class Lineage:
    """One initializer and the tensor it is compared with.

    status: `equal` (bit for bit, after the cast to the initializer's dtype), `transposed`
    (equal to the transposed tensor), `different`, or `unmatched` (`tensor` is None).
    """

    initializer: str
    tensor: str | None
    status: str


def compare_initializers(
    onnx_path: Path, checkpoint_dir: Path, initializers: Path | None = None
) -> tuple[Lineage, ...]:
    """One row per initializer of the main graph, in the file's order; one tensor in memory.

    `initializers` is the folder in which external data lies, by default the file's own.
    Raises `OnnxError` for a file that `onnxfile.check` refuses, `CheckpointError` for a
    malformed checkpoint.
    """
    onnxfile.check(onnx_path, initializers=initializers)
    proto = onnxfile.read(onnx_path, initializers)
    checkpoint = Checkpoint.open(checkpoint_dir)
    folder = initializers or onnx_path.parent
    return tuple(_trace(tensor, folder, checkpoint) for tensor in proto.graph.initializer)


def _trace(tensor: Any, folder: Path, checkpoint: Checkpoint) -> Lineage:
    named = find_tensor(tensor.name, checkpoint.tensors)
    if named is not None:
        status = _compare(read_tensor(tensor, folder), checkpoint, named)
        return Lineage(tensor.name, named, status)
    if math.prod(tensor.dims) >= MIN_ELEMENTS:
        values = read_tensor(tensor, folder)
        for name in _same_shape(values, checkpoint):
            status = _compare(values, checkpoint, name)
            if status != "different":
                return Lineage(tensor.name, name, status)
    return Lineage(tensor.name, None, "unmatched")


def _same_shape(values: NDArray[Any], checkpoint: Checkpoint) -> list[str]:
    shapes = (values.shape, values.shape[::-1])
    return [name for name, info in checkpoint.tensors.items() if info.shape in shapes]


def _compare(values: NDArray[Any], checkpoint: Checkpoint, name: str) -> str:
    info = checkpoint.info(name)
    if info.shape not in (values.shape, values.shape[::-1]):
        return "different"
    if not _is_float(values.dtype) or not _is_float(numpy_dtype(info.dtype)):
        return "different"
    source = cast(checkpoint.read(name), values.dtype)
    if source.shape == values.shape and source.tobytes() == values.tobytes():
        return "equal"
    # tobytes writes in C order, so a transposed view compares as a transposed matrix.
    transposed = values.ndim == 2 and source.T.shape == values.shape
    return "transposed" if transposed and source.T.tobytes() == values.tobytes() else "different"


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"
