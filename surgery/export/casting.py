"""Arrays in another element type, and matrices turned."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from surgery.errors import InputError, quote

_STRIP = 256
"""Rows that are transposed at a time."""


def turned(matrix: NDArray[Any]) -> NDArray[Any]:
    """`matrix.T` in C order. A strip at a time stays in the caches, which the whole does not."""
    turned = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, len(matrix), _STRIP):
        strip = slice(start, start + _STRIP)
        turned[:, strip] = matrix[strip].T
    return turned


def float_dtype(name: str) -> np.dtype[Any]:
    """The dtype of a float type by numpy's name of it; raises `InputError` for another type."""
    if name == "bfloat16":
        dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return dtype
    if name in ("float16", "float32", "float64"):
        return np.dtype(name)
    raise InputError(f"{quote(name)} is not a float type that weights are cast to")


def cast(source: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """`source` in `dtype`, rounded once to nearest-even; overflow gives infinities, in silence."""
    if source.dtype == ml_dtypes.bfloat16 and dtype == np.float16:
        source = source.astype(np.float32)  # exact; ml_dtypes' own cast is not numpy's
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(source.astype(dtype, copy=False))
