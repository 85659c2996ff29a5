"""An initializer against a tensor, or one transposed, in blocks that stay in a core's own cache.

Most of a model is such weights. Both files are read once, in order, into memory that a thread
keeps: giving it back and getting it again costs more than the comparison. The numbers of a tensor
that is transposed are read in bands of whole rows; each band is held against the same columns of
the initializer.
"""

from __future__ import annotations

import math
from threading import local
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import bits
from surgery.export.casting import cast
from surgery.export.lineage.stored import Fill, Stored

BLOCK = 1 << 17
"""Elements that are compared at a time."""
BAND_BYTES = 32 << 20
"""Of a tensor that is transposed."""
_WIDTH, _HEIGHT = 256, 2048
"""Of the tiles of a matrix that is transposed."""
_PADDING = 32
"""Elements between the rows of a tile: at a power of two apart they would share few cache lines."""


class _Memory(local):
    """Arrays of a thread by what they are for, which only grow."""

    def __init__(self) -> None:
        self._kept: dict[str, NDArray[np.uint8]] = {}

    def take(self, use: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array with what the last call for the same use left in it, at first zeros."""
        size = math.prod(shape) * dtype.itemsize
        if use not in self._kept or self._kept[use].size < size:
            self._kept[use] = np.empty(size, np.uint8)
            self._kept[use].fill(0)
        return self._kept[use][:size].view(dtype).reshape(shape)


_MEMORY = _Memory()


def same(stored: Stored, tensor: Stored) -> bool:
    """Whether an initializer is a tensor of its shape, cast to its dtype, in every bit."""
    with stored.reader() as fill_found, tensor.reader() as fill_wanted:
        for start in range(0, stored.size, BLOCK):
            shape = (min(BLOCK, stored.size - start),)
            found = _MEMORY.take("found", shape, stored.dtype)
            wanted = _MEMORY.take("wanted", shape, tensor.dtype)
            fill_found(found, start)
            fill_wanted(wanted, start)
            if not np.array_equal(bits(found), bits(_cast(wanted, stored.dtype))):
                return False
    return True


def same_turned(stored: Stored, tensor: Stored) -> bool:
    """Whether an initializer is a matrix transposed, and cast to its dtype, in every bit."""
    rows, width = tensor.shape
    step = max(1, BAND_BYTES // (width * tensor.dtype.itemsize))
    with stored.reader() as fill_found, tensor.reader() as fill_wanted:
        for start in range(0, rows, step):
            band = _MEMORY.take("band", (min(step, rows - start), width), tensor.dtype)
            fill_wanted(band, start * width)
            for column in range(0, width, _WIDTH):
                stripe = band[:, column : column + _WIDTH]
                found = _MEMORY.take("found", stripe.shape[::-1], stored.dtype)
                _fill(found, column * rows + start, rows, fill_found)
                if not _same_stripe(found, stripe):
                    return False
    return True


def _fill(found: NDArray[Any], first: int, width: int, fill: Fill) -> None:
    """A part of a matrix of so many columns, from element `first` of it on."""
    if found.shape[1] == width:
        fill(found, first)
        return
    for number, row in enumerate(found):
        fill(row, first + number * width)


def _same_stripe(found: NDArray[Any], stripe: NDArray[Any]) -> bool:
    """Whether `found` is `stripe` transposed."""
    for row in range(0, len(stripe), _HEIGHT):
        here = bits(found[:, row : row + _HEIGHT])
        if not np.array_equal(here, bits(_turned(stripe[row : row + _HEIGHT], found.dtype))):
            return False
    return True


def _turned(tile: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A tile transposed and cast.

    It is moved as integers: numpy holds on to the interpreter while it copies bfloat16.
    """
    (height, width), source = tile.shape, bits(tile)
    padded = _MEMORY.take("padded", (height, width + _PADDING), source.dtype)[:, :width]
    padded[:] = source
    if _widens(tile.dtype, dtype):
        return _widened(padded.T)
    turned = _MEMORY.take("turned", (width, height), source.dtype)
    turned[:] = padded.T
    return cast(turned.view(tile.dtype), dtype)


def _cast(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    return _widened(bits(values)) if _widens(values.dtype, dtype) else cast(values, dtype)


def _widens(source: np.dtype[Any], dtype: np.dtype[Any]) -> bool:
    return source == ml_dtypes.bfloat16 and dtype == np.float32


def _widened(values: NDArray[Any]) -> NDArray[Any]:
    """The bits of bfloat16 as float32: the upper half; the lower stays zero between calls."""
    wide = _MEMORY.take("widened", values.shape, np.dtype(np.uint32))
    wide.view(np.uint16)[..., 1::2] = values
    return wide.view(np.float32)
