"""safetensors element types: their width on disk, and which numpy can hold.

Types numpy lacks (float8, packed 4- and 6-bit) are known by their width alone: they are copied
as bytes and refused as edit targets.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from surgery.errors import CheckpointError, quote

BITS: dict[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

_NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("<u1"), "I8": np.dtype("<i1"),
    "U16": np.dtype("<u2"), "I16": np.dtype("<i2"), "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"), "I32": np.dtype("<i4"), "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"), "I64": np.dtype("<i8"), "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}  # fmt: skip

EDITABLE = ("F64", "F32", "F16", "BF16")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of safetensors type `name`; raises `CheckpointError` if numpy has none."""
    if name not in _NUMPY:
        raise CheckpointError(
            f"dtype {quote(name)} cannot be read as numbers; supported: {', '.join(_NUMPY)}"
        )
    return _NUMPY[name]


def compute_dtype(name: str) -> np.dtype[Any]:
    """The dtype in which tensors stored as `name` are edited: float64 for F64, else float32.

    Raises `CheckpointError` for types that are no edit targets.
    """
    if name not in EDITABLE:
        raise CheckpointError(
            f"dtype {quote(name)} cannot be edited; editable: {', '.join(EDITABLE)}"
        )
    return np.dtype(np.float64 if name == "F64" else np.float32)


def bits(values: NDArray[Any]) -> NDArray[Any]:
    """The same memory as unsigned integers: what two NaNs, or the two zeros, differ in."""
    return values.view(f"u{values.dtype.itemsize}")
