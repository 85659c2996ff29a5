"""What differs between two checkpoints, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import EDITABLE

MAX_RANK_SIDE = 4096
"""Rows or columns, whichever are fewer, up to which a rank is computed: it takes their cube."""


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
    """`changed` tensors of two checkpoints, `equal` ones by count, and those that cannot be
    compared: `only_a` and `only_b` by name, `other_form` with another shape or dtype."""

    equal: int
    changed: tuple[TensorChange, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    other_form: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        return not (self.changed or self.only_a or self.only_b or self.other_form)


def diff_weights(a: Path, b: Path) -> Comparison:
    """Compares checkpoint folders `a` and `b`; raises `CheckpointError` for a malformed one."""
    left, right = Checkpoint.open(a), Checkpoint.open(b)
    common = [name for name in left.tensors if name in right.tensors]
    alike = [n for n in common if _form(left, n) == _form(right, n)]
    changed = tuple(_changes(left, right, alike))
    return Comparison(
        len(alike) - len(changed),
        changed,
        tuple(sorted(set(left.tensors) - set(common))),
        tuple(sorted(set(right.tensors) - set(common))),
        tuple(sorted(set(common) - set(alike))),
    )


def _form(checkpoint: Checkpoint, name: str) -> tuple[str, tuple[int, ...]]:
    info = checkpoint.tensors[name]
    return info.dtype, info.shape


def _changes(left: Checkpoint, right: Checkpoint, names: list[str]) -> Iterator[TensorChange]:
    for name in names:
        info = left.tensors[name]
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
        _rank(change, b, differs) if matrix else None,
    )


def _rank(change: NDArray[np.float64], b: NDArray[Any], differs: NDArray[np.bool_]) -> int | None:
    """Numerical rank of the changed block: its singular values above what rounding makes.

    An element b of the result is off by up to eps/2·|b|, and a random matrix of such errors has
    no singular value above their root mean square times √rows + √columns. None where the block
    holds NaN or infinities, or is too large to decompose.
    """
    rows, columns = differs.any(axis=1), differs.any(axis=0)
    block, result = change[rows][:, columns], b[rows][:, columns].astype(np.float64)
    if not np.isfinite(block).all() or min(block.shape) > MAX_RANK_SIDE:
        return None
    singular = np.linalg.svd(block, compute_uv=False)
    half_ulp = float(ml_dtypes.finfo(b.dtype).eps) / 2
    rounding = half_ulp * np.sqrt(np.square(result).mean()) * np.sqrt(block.shape).sum()
    exact = singular[0] * max(block.shape) * np.finfo(np.float64).eps
    return int((singular > max(rounding, exact)).sum())
