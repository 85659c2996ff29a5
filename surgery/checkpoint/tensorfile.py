"""Numbers of a safetensors file, in bands of whole rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Region
from surgery.checkpoint.dtypes import EDITABLE, numpy_dtype
from surgery.checkpoint.files import open_regular, read_exactly
from surgery.checkpoint.header import TensorInfo, read_header
from surgery.errors import CheckpointError, quote


def read_rows(path: Path, info: TensorInfo, rows: Region) -> NDArray[Any]:
    """The band `rows` of whole rows (first axis) of the tensor `info` of file `path`, as stored.

    The name in `rows` does not matter. Raises `CheckpointError` where the file ends too soon.
    """
    dtype = numpy_dtype(info.dtype)
    size = math.prod(rows.shape) * dtype.itemsize
    offset = rows.start[0] * math.prod(info.shape[1:]) * dtype.itemsize if rows.start else 0
    with open_regular(path) as descriptor:
        raw = read_exactly(descriptor, info.begin + offset, size, info.file)
    return np.frombuffer(raw, dtype).reshape(rows.shape)


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file that a recipe names: its header; numbers are read when asked for."""

    path: Path
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Reads the header of `path`; raises `CheckpointError` for a malformed file."""
        with open_regular(path) as descriptor:
            return cls(path, read_header(descriptor, str(path)).tensors)

    def info(self, name: str) -> TensorInfo:
        """Where the tensor lies; raises `CheckpointError` if it is missing or not of floats."""
        info = self.tensors.get(name)
        if info is None:
            known = ", ".join(quote(known) for known in list(self.tensors)[:3]) or "none"
            raise CheckpointError(f"{self.path}: has no tensor {quote(name)}; it holds {known}")
        if info.dtype not in EDITABLE:
            raise CheckpointError(
                f"{self.path}: {quote(name)} is stored as {info.dtype}; "
                f"expected {', '.join(EDITABLE)}"
            )
        return info

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` of the first axis, in the stored dtype; all of a 0-d tensor."""
        info = self.info(name)
        whole = Region.whole(name, info.shape)
        band = Region.band(name, info.shape, 0, start, stop) if info.shape else whole
        return read_rows(self.path, info, band)

    def read(self, name: str) -> NDArray[np.float64]:
        """The whole tensor in float64."""
        shape = self.info(name).shape
        return self.rows(name, 0, shape[0] if shape else 0).astype(np.float64)
