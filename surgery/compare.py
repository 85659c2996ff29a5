"""What differs between two checkpoints of one layout, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import EDITABLE
from surgery.errors import CheckpointError, quote


@dataclass(frozen=True)
class TensorChange:
    """How tensor `name` of B differs from that of A.

    `rows` and `columns` are the indices along the first and the last axis that hold a change
    (None for tensors that are not matrices); `frobenius` and `max_abs` are of B − A in float64,
    None for dtypes that are only bytes; `rank` is the numerical rank of B − A.
    """

    name: str
    rows: tuple[int, ...] | None
    columns: tuple[int, ...] | None
    frobenius: float | None
    max_abs: float | None
    rank: int | None


@dataclass(frozen=True)
class Comparison:
    """`changed` tensors of two checkpoints, `equal` ones by count."""

    equal: int
    changed: tuple[TensorChange, ...]


def diff_weights(a: Path, b: Path) -> Comparison:
    """Compares checkpoint folders `a` and `b`.

    Raises `CheckpointError` for a malformed one, and where names, shapes or dtypes differ.
    """
    left, right = Checkpoint.open(a), Checkpoint.open(b)
    _refuse_other_layout(left, right)
    changed = tuple(_changes(left, right))
    return Comparison(len(left.tensors) - len(changed), changed)


def _refuse_other_layout(left: Checkpoint, right: Checkpoint) -> None:
    for name in sorted({*left.tensors, *right.tensors}):
        forms = [(t.dtype, t.shape) for t in (left.tensors.get(name), right.tensors.get(name)) if t]
        if len(forms) != 2 or forms[0] != forms[1]:
            raise CheckpointError(
                f"{right.root}: {quote(name)} is not there with the same shape and dtype as in "
                f"{left.root}; only checkpoints of one layout can be compared"
            )


def _changes(left: Checkpoint, right: Checkpoint) -> Iterator[TensorChange]:
    for name, info in left.tensors.items():
        if left.read_bytes(name) == right.read_bytes(name):
            continue
        if info.dtype in EDITABLE:
            yield _numeric_change(name, left.read(name), right.read(name))
        else:
            yield TensorChange(name, None, None, None, None, None)


def _numeric_change(name: str, a: NDArray[Any], b: NDArray[Any]) -> TensorChange:
    bits = np.dtype(f"u{a.dtype.itemsize}")
    differs = a.view(bits) != b.view(bits)
    with np.errstate(invalid="ignore"):
        change = b.astype(np.float64) - a.astype(np.float64)
    matrix = a.ndim == 2
    return TensorChange(
        name,
        tuple(np.flatnonzero(differs.any(axis=1)).tolist()) if matrix else None,
        tuple(np.flatnonzero(differs.any(axis=0)).tolist()) if matrix else None,
        float(np.linalg.norm(change)),
        float(np.abs(change).max()),
        _rank(change, differs) if matrix else None,
    )


def _rank(change: NDArray[np.float64], differs: NDArray[np.bool_]) -> int | None:
    """Numerical rank of the changed block; None where it holds NaN or infinities."""
    block = change[differs.any(axis=1)][:, differs.any(axis=0)]
    return int(np.linalg.matrix_rank(block)) if np.isfinite(block).all() else None
