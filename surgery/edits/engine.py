"""Applying the edits of a plan to one tensor: pure numbers, no files.

All edits of a tensor are computed in its compute dtype (float64 for F64, else float32) and
rounded once to the stored dtype, to nearest even. Elements that no edit changed keep their
stored bits, NaN payloads included, so that a no-op is bit-identical.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Region
from surgery.checkpoint.dtypes import bits
from surgery.edits.interface import Array
from surgery.errors import EditError, quote


def round_once(rows: Region, stored: NDArray[Any], edited: Array) -> NDArray[Any]:
    """`edited` in the dtype of `stored`, with the bits of `stored` wherever nothing changed.

    Both are the part `rows` of a tensor. Raises `EditError` naming the first element where a
    finite number became NaN or infinite, or an infinite one NaN, in the computation or by
    overflow of the stored dtype.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        before = stored.astype(edited.dtype)
        rounded = edited.astype(stored.dtype)
    # By their bits: -0.0 == +0.0, but writing one for the other is a change of a byte.
    same = (bits(before) == bits(edited)) | (np.isnan(before) & np.isnan(edited))
    _refuse_non_finite(rows, before, rounded)
    np.copyto(rounded, stored, where=same)
    return rounded


def _refuse_non_finite(rows: Region, before: Array, after: NDArray[Any]) -> None:
    with np.errstate(invalid="ignore"):
        numbers = after.astype(before.dtype)
    finite = np.isfinite(numbers)
    if finite.all():
        return
    made = np.isfinite(before) & ~finite | np.isinf(before) & np.isnan(numbers)
    if made.any():
        index = tuple(int(i) for i in np.argwhere(made)[0])
        place = [start + i for start, i in zip(rows.start, index, strict=True)]
        raise EditError(
            f"{quote(rows.tensor)}: the edit turns {before[index]} at {place} into {after[index]} "
            f"as {after.dtype}; use a smaller factor or strength"
        )
