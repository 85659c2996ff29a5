"""What differs between two checkpoints, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Region
from surgery.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import EDITABLE, bits, numpy_dtype
from surgery.checkpoint.files import CHUNK
from surgery.editor import bands

MAX_RANK_SIDE = 4096
"""Rows or columns, whichever are fewer, up to which a rank is computed: it takes their cube."""

MAX_RANK_SIZE = 1 << 26
"""Elements up to which a rank is computed: they are held in float64, some times over."""


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


def diff_weights(a: Path, b: Path, *, allow_code: bool = False) -> Comparison:
    """Compares checkpoint folders `a` and `b`; raises `CheckpointError` for a malformed one."""
    left, right = (Checkpoint.open(folder, allow_code=allow_code) for folder in (a, b))
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
        if left.tensors[name].dtype in EDITABLE:
            change = _Change(left, right, name)
            if change.rows.size:
                yield change.described()
        elif not _same_bytes(left, right, name):
            yield TensorChange(name, None, None, None, None, None)


def _same_bytes(left: Checkpoint, right: Checkpoint, name: str) -> bool:
    size = left.tensors[name].nbytes
    parts = [(begin, min(CHUNK, size - begin)) for begin in range(0, size, CHUNK)]
    return all(left.read_bytes(name, *part) == right.read_bytes(name, *part) for part in parts)


class _Change:
    """What differs between a tensor of `left` and that of `right`, gathered band by band."""

    def __init__(self, left: Checkpoint, right: Checkpoint, name: str) -> None:
        self._left, self._right, self._info = left, right, left.tensors[name]
        self._squares, self._largest = 0.0, 0.0
        columns = self._info.shape[-1] if self._matrix else 1
        self._columns = np.zeros(columns, bool)
        found = [self._add(band) for band in bands(self._info)]
        self.rows = np.concatenate(found)

    @property
    def _matrix(self) -> bool:
        return len(self._info.shape) == 2

    def _add(self, band: Region) -> NDArray[np.intp]:
        """Counts a band in; the rows of the tensor that differ in it."""
        a, b = (side.read_rows(self._info.name, band) for side in (self._left, self._right))
        differs = bits(a) != bits(b)
        if not differs.any():
            return np.empty(0, np.intp)
        with np.errstate(invalid="ignore"):
            change = b.astype(np.float64) - a.astype(np.float64)
            self._squares += float(np.square(change).sum())
        self._largest = float(np.max(np.abs(change), initial=self._largest))
        flat = differs.reshape(differs.shape[0] if differs.ndim else 1, -1)
        if self._matrix:
            self._columns |= flat.any(axis=0)
        return np.flatnonzero(flat.any(axis=1)) + (band.start[0] if band.start else 0)

    def described(self) -> TensorChange:
        name = self._info.name
        if not self._matrix:
            return TensorChange(name, None, None, self._norm, self._largest, None)
        rows, columns = (tuple(i.tolist()) for i in (self.rows, np.flatnonzero(self._columns)))
        return TensorChange(name, rows, columns, self._norm, self._largest, self._rank())

    @property
    def _norm(self) -> float:
        return float(np.sqrt(self._squares))

    def _rank(self) -> int | None:
        """Numerical rank of the changed block: its singular values above what rounding makes.

        An element b of the result is off by up to eps/2·|b|, and a random matrix of such errors
        has no singular value above their root mean square times √rows + √columns. None where the
        block holds NaN or infinities, or is too large to decompose.
        """
        shape = (self.rows.size, int(self._columns.sum()))
        if min(shape) > MAX_RANK_SIDE or shape[0] * shape[1] > MAX_RANK_SIZE:
            return None
        before, result = self._block(self._left), self._block(self._right)
        block = result - before
        if not np.isfinite(block).all():
            return None
        singular = np.linalg.svd(block, compute_uv=False)
        half_ulp = float(ml_dtypes.finfo(numpy_dtype(self._info.dtype)).eps) / 2
        rounding = half_ulp * np.sqrt(np.square(result).mean()) * np.sqrt(shape).sum()
        exact = singular[0] * max(shape) * np.finfo(np.float64).eps
        return int((singular > max(rounding, exact)).sum())

    def _block(self, side: Checkpoint) -> NDArray[np.float64]:
        """The rows and columns that differ, of one side, in float64."""
        parts = []
        for band in bands(self._info):
            own = self.rows[(self.rows >= band.start[0]) & (self.rows < band.stop[0])]
            if own.size:
                numbers = side.read_rows(self._info.name, band)
                parts.append(numbers[own - band.start[0]][:, self._columns].astype(np.float64))
        return np.concatenate(parts)
