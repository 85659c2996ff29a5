"""How a tensor's shape changes along one axis: some of it goes, or some comes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Region, runs

Side = Literal["before", "after"]
"""A checkpoint as it was and as it becomes."""


@dataclass(frozen=True)
class Resize:
    """A tensor becomes shorter or longer along `axis`.

    The longer of the two is the whole, of length `size`; the shorter has of it the indices in the
    ranges `kept`, in order. `longer` says which that is: `before` where the tensor is pruned,
    `after` where it grows, and what comes then begins as zeros. Bands are of the whole.
    """

    axis: int
    size: int
    kept: tuple[tuple[int, int], ...]
    longer: Side

    @classmethod
    def without(cls, axis: int, size: int, dropped: Iterable[int]) -> Resize:
        """An axis of length `size` loses the indices `dropped`."""
        return cls(axis, size, tuple(runs(set(range(size)) - set(dropped))), "before")

    @classmethod
    def grown(cls, axis: int, size: int, by: int) -> Resize:
        """An axis of length `size` has `by` more indices at its end."""
        return cls(axis, size + by, ((0, size),), "after")

    def shape(self, side: Side, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape on `side` of a tensor that has `shape` on either."""
        length = self.size if side == self.longer else self._count(self.size)
        return (*shape[: self.axis], length, *shape[self.axis + 1 :])

    def fits(self, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
        """Whether the ranges are in order and lead from one shape to the other."""
        edges = [edge for run in self.kept for edge in run]
        ordered = all(a <= b for a, b in pairwise([0, *edges, self.size]))
        axes = self.axis < len(before) == len(after)
        return (
            ordered
            and axes
            and self.shape("before", after) == before
            and self.shape("after", before) == after
        )

    def region(self, side: Side, rows: Region) -> Region:
        """Where that which `side` has of the band `rows` lies in its tensor."""
        if side == self.longer:
            return rows
        start, stop = list(rows.start), list(rows.stop)
        start[self.axis] = self._count(start[self.axis])
        stop[self.axis] = self._count(stop[self.axis])
        return Region(rows.tensor, tuple(start), tuple(stop))

    def missing(self, tensor: str, shape: tuple[int, ...]) -> tuple[Region, ...]:
        """What the shorter one has not of `tensor`, whose `shape` is that of the whole."""
        kept = {index for run in self.kept for index in range(*run)}
        gone = runs(set(range(self.size)) - kept)
        return tuple(Region.band(tensor, shape, self.axis, *run) for run in gone)

    def take(self, side: Side, rows: Region, values: NDArray[Any]) -> NDArray[Any]:
        """What `side` has of the numbers of the band `rows`."""
        return values if side == self.longer else np.compress(self._mask(rows), values, self.axis)

    def spread(self, side: Side, rows: Region, taken: NDArray[Any]) -> NDArray[Any]:
        """The band `rows` with what `side` has of it in place, and zeros where it has nothing."""
        if side == self.longer:
            return taken
        values = np.zeros(rows.shape, taken.dtype)
        values[(slice(None),) * self.axis + (self._mask(rows),)] = taken
        return values

    def _mask(self, rows: Region) -> NDArray[np.bool_]:
        mask = np.zeros(rows.shape[self.axis], bool)
        first = rows.start[self.axis]
        for start, stop in self.kept:
            mask[max(start - first, 0) : max(stop - first, 0)] = True
        return mask

    def _count(self, index: int) -> int:
        """How many kept indices lie below `index`."""
        return sum(min(max(index - start, 0), stop - start) for start, stop in self.kept)
