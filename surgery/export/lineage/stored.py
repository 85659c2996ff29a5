"""Arrays where they lie, in a file or in memory: read in bands, stripes or single elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import numpy_dtype
from surgery.checkpoint.files import open_regular, read_exactly, read_into
from surgery.export.external import location, tensor_bytes

Fill = Callable[[NDArray[Any], int], None]
"""Fills an array in row-major order with the elements from one of the flattened array on."""

FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Stored:
    """An array in row-major order: `offset` bytes into the file `path`, or the bytes `data`."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    path: Path | None = None
    offset: int = 0
    data: NDArray[np.uint8] | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def is_float(self) -> bool:
        return self.dtype.name in FLOATS

    def read(self) -> NDArray[Any]:
        """All of it."""
        return self.rows(0, self.shape[0] if self.shape else 0)

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` of the first axis; all of an array without axes."""
        width = math.prod(self.shape[1:])
        first, count = (start * width, (stop - start) * width) if self.shape else (0, 1)
        with self._opened() as source:
            values = self._values(source, first, count)
        return values.reshape((stop - start, *self.shape[1:]) if self.shape else ())

    def columns(self, start: int, stop: int) -> NDArray[Any]:
        """Columns `start` to `stop` of a matrix."""
        rows, width = self.shape
        if stop - start == width:
            return self.rows(0, rows)
        found = np.empty((rows, stop - start), self.dtype)
        if self.path is None:
            found[:] = self.rows(0, rows)[:, start:stop]
            return found
        views, size = found.view(np.uint8), self.dtype.itemsize
        with self._opened() as source:
            for row in range(rows):
                begin = self.offset + (row * width + start) * size
                read_into(source, begin, views[row].data, str(self.path))
        return found

    def elements(self, flat: NDArray[np.int64]) -> NDArray[Any]:
        """The elements at these places of the flattened array."""
        size = self.dtype.itemsize
        if self.data is not None:
            return self.data.view(self.dtype)[flat]
        with self._opened() as source:
            begins = (flat * size + self.offset).tolist()
            read = [read_exactly(source, begin, size, str(self.path)) for begin in begins]
        return np.frombuffer(b"".join(read), self.dtype)

    @contextmanager
    def reader(self) -> Iterator[Fill]:
        """Fills arrays the caller has already, while entered."""
        with self._opened() as source:

            def fill(into: NDArray[Any], first: int) -> None:
                raw, begin = into.reshape(-1).view(np.uint8), first * self.dtype.itemsize
                if self.data is not None:
                    raw[:] = self.data[begin : begin + raw.size]
                else:
                    read_into(source, self.offset + begin, raw.data, str(self.path))

            yield fill

    @contextmanager
    def _opened(self) -> Iterator[int]:
        if self.path is None:
            yield -1
        else:
            with open_regular(self.path) as descriptor:
                yield descriptor

    def _values(self, source: int, first: int, count: int) -> NDArray[Any]:
        begin, length = first * self.dtype.itemsize, count * self.dtype.itemsize
        if self.data is not None:
            return self.data[begin : begin + length].view(self.dtype)
        found: NDArray[np.uint8] = np.empty(length, np.uint8)
        read_into(source, self.offset + begin, found.data, str(self.path))
        return found.view(self.dtype)


def stored_tensor(checkpoint: Checkpoint, name: str) -> Stored:
    """A checkpoint tensor where it lies."""
    info = checkpoint.info(name)
    return Stored(name, numpy_dtype(info.dtype), info.shape, checkpoint.path(info.file), info.begin)


def stored_initializer(tensor: Any, folder: Path) -> Stored | None:
    """A checked TensorProto where it lies; None for strings and packed types, which are no
    weights of a checkpoint."""
    from onnx import helper, numpy_helper

    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    shape = tuple(tensor.dims)
    size = math.prod(shape) * dtype.itemsize
    if dtype.kind == "O" or size != tensor_bytes(tensor, tensor.name):
        return None
    if tensor.data_location == tensor.EXTERNAL:
        path, offset, _ = location(tensor, tensor.name)
        return Stored(tensor.name, dtype, shape, folder / path, offset)
    values = np.ascontiguousarray(numpy_helper.to_array(tensor)).reshape(-1)
    return Stored(tensor.name, dtype, shape, data=values.view(np.uint8))


def place(stored: Stored) -> tuple[int, int] | None:
    """Which file it lies in, as (device, inode); None for one in memory."""
    if stored.path is None:
        return None
    facts = stored.path.stat()
    return facts.st_dev, facts.st_ino
