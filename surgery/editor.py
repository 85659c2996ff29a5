"""The numbers of a plan: every edited tensor, slab by slab, whoever writes or checks them.

A slab is a band of whole rows (the first axis) of at most `SLAB_BYTES` as stored, so that memory
follows the slab and not the tensor. All edits of a slab are computed in the tensor's compute
dtype and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Region
from surgery.checkpoint import TensorInfo
from surgery.checkpoint.delta import Factors
from surgery.checkpoint.dtypes import compute_dtype, numpy_dtype
from surgery.edits.engine import round_once
from surgery.edits.interface import Array
from surgery.plan import Plan, Step

SLAB_BYTES = 512 << 10
"""Stored bytes of one slab; computing it takes about eight times as much, which shall fit the
processor's cache."""

Observer = Callable[[Region, Region, Factors | None], None]
"""Called with a region of the plan, the part of it in this band and the edit's factors there."""


@dataclass
class Editor:
    """Computes the edited tensors of a plan; prepares each edit's state once.

    After `prepare_all` it only reads, and may be used by several threads.
    """

    plan: Plan
    _states: dict[int, Any] = field(default_factory=dict)

    def prepare_all(self) -> None:
        """Prepares every edit, in recipe order."""
        for edit in range(len(self.plan.edits)):
            self.state(edit)

    def state(self, edit: int) -> Any:
        """What edit number `edit` prepared, from tensors as the edits before it left them."""
        if edit not in self._states:
            reader = _EarlierEdits(self, edit)
            with np.errstate(over="ignore", invalid="ignore"):
                self._states[edit] = self.plan.edits[edit].prepare(self.plan.arch, reader)
        return self._states[edit]

    def slabs(self, tensor: str) -> Iterator[tuple[Region, NDArray[Any]]]:
        """The tensor as it is before any edit, grown: each band of rows and its numbers."""
        for rows in bands(self.plan.tensors[tensor]):
            yield rows, self.stored(tensor, rows)

    def stored(self, tensor: str, rows: Region) -> NDArray[Any]:
        """Rows of the tensor before any edit, as stored; what comes to it begins as zeros."""
        base = self.plan.base
        if tensor in base.tensors:
            return self.plan.spread(rows, base.read_rows(tensor, self.plan.region("before", rows)))
        new = next(new for new in self.plan.added if new.name == tensor)
        if new.source is None:
            return np.zeros(rows.shape, numpy_dtype(new.dtype))
        return base.read_rows(new.source, rows)

    def edited(
        self, rows: Region, stored: NDArray[Any], observe: Observer | None = None
    ) -> NDArray[Any]:
        """`stored`, the rows `rows` of a tensor, after every edit, rounded once.

        `observe` is told the low-rank factors of each edit of the band. Raises `EditError` where an
        edit makes a number that is none.
        """
        steps = self._touching(rows)
        if not steps:
            return stored
        return round_once(rows, stored, self._run(stored, steps, rows, observe))

    def unrounded(self, tensor: str) -> Array:
        """The whole tensor after every edit, in compute dtype: what an oracle is compared with."""
        parts = [part for _, part in self.rows_before(tensor, len(self.plan.edits))]
        whole = Region.whole(tensor, self.plan.tensors[tensor].shape)
        return self.plan.take("after", whole, np.concatenate(parts) if whole.shape else parts[0])

    def rows_before(self, tensor: str, edit: int) -> Iterator[tuple[slice, Array]]:
        """The tensor after the edits before number `edit`, in compute dtype, band by band."""
        for rows, stored in self.slabs(tensor):
            steps = [step for step in self._touching(rows) if step.edit < edit]
            band = rows.slices[0] if rows.slices else slice(None)
            yield band, self._run(stored, steps, rows)

    def _touching(self, rows: Region) -> list[Step]:
        steps = self.plan.steps_of(rows.tensor)
        return [step for step in steps if step.target.region.overlaps(rows)]

    def _run(
        self,
        stored: NDArray[Any],
        steps: list[Step],
        rows: Region,
        observe: Observer | None = None,
    ) -> Array:
        dtype = compute_dtype(self.plan.tensors[rows.tensor].dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            numbers = stored.astype(dtype)
            for step in steps:
                region = step.target.region.intersection(rows)
                window = region.within(rows)
                edit, state = self.plan.edits[step.edit], self.state(step.edit)
                if observe is not None:
                    factors = edit.factors(numbers[window], region, state)
                    observe(step.target.region, region, factors)
                numbers[window] = edit.transform(numbers[window], region, state)
        return numbers


@dataclass(frozen=True)
class _EarlierEdits:
    editor: Editor
    edit: int

    def rows(self, tensor: str) -> Iterator[tuple[slice, Array]]:
        return self.editor.rows_before(tensor, self.edit)


def bands(info: TensorInfo) -> Iterator[Region]:
    """The tensor as bands of whole rows of at most `SLAB_BYTES`, and at least one row.

    A tensor without rows to cut (0-d, or with an axis of length 0) is one band.
    """
    if not info.shape or not info.nbytes:
        yield Region.whole(info.name, info.shape)
        return
    height = max(1, SLAB_BYTES * info.shape[0] // info.nbytes)
    for start in range(0, info.shape[0], height):
        stop = min(start + height, info.shape[0])
        yield Region.band(info.name, info.shape, 0, start, stop)


def row_bytes(info: TensorInfo) -> int:
    """Stored bytes of one row (one index of the first axis)."""
    return math.prod(info.shape[1:]) * numpy_dtype(info.dtype).itemsize
