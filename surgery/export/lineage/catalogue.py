"""Every expression that an initializer may hold, found by a few of its elements."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.export.casting import cast
from surgery.export.expressions import Cast, Expression, Shape, Stack, Transpose
from surgery.export.lineage.sampling import Places, Sampler, places, swapped, turn
from surgery.export.lineage.stored import Stored

_VOTES = 0.25
_COSINE = 0.98


@dataclass(frozen=True)
class _Group:
    """Samples [expressions, elements] of all expressions of one shape, in one dtype."""

    expressions: Sequence[Expression]
    samples: NDArray[Any]
    exact: dict[bytes, list[int]]


@dataclass
class Catalogue:
    """`expressions` by their shapes; each group is sampled when it is first asked for."""

    sampler: Sampler
    expressions: Iterable[Expression]
    _by_shape: dict[Shape, list[Expression]] = field(default_factory=dict)
    _groups: dict[tuple[Shape, str], _Group] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for expression in self.expressions:
            self._by_shape.setdefault(self.sampler.shape(expression), []).append(expression)

    def fits(self, shape: Shape) -> bool:
        """Whether any expression has this shape, or has it transposed."""
        return any(turned in self._by_shape for turned, _ in _orientations(_inner(shape)))

    def exact(self, stored: Stored) -> Iterator[Expression]:
        """Expressions of the initializer's shape and dtype that agree with it on the sample."""
        for group, values, turned in self._samples(stored):
            for index in group.exact.get(values.tobytes(), ()):
                yield shaped(group.expressions[index], stored, turned)

    def near(self, stored: Stored, tolerance: float = 0.0) -> Expression | None:
        """The expression that an initializer is most like, if it is like one at all.

        Like means that a quarter of the sample is the same (but for `tolerance`, a share of the
        largest), or that all of it is nearly a multiple. Nothing is like an array whose sample is
        one number over and over.
        """
        found: list[tuple[float, Expression]] = []
        for group, values, turned in self._samples(stored):
            if _is_constant(values):
                continue
            likeness = _likeness(group.samples, values, tolerance)
            best = int(np.argmax(likeness))
            if likeness[best] > 0:
                found.append((likeness[best], shaped(group.expressions[best], stored, turned)))
        return max(found, key=lambda pair: pair[0])[1] if found else None

    def agrees(self, stored: Stored, expression: Expression) -> bool:
        """Whether an expression of the initializer's shape and dtype is equal on the sample."""
        wanted, found = self._both(stored, expression)
        return wanted.tobytes() == found.tobytes()

    def likeness(self, stored: Stored, expression: Expression, tolerance: float = 0.0) -> float:
        """How like an initializer is to one expression of its shape and dtype."""
        wanted, found = self._both(stored, expression)
        return float(_likeness(wanted[None], found, tolerance)[0])

    def is_constant(self, stored: Stored) -> bool:
        """Whether every sampled element of an array is the same number."""
        return stored.size == 0 or _is_constant(self.sampler.elements(stored, places(stored.shape)))

    def _both(self, stored: Stored, expression: Expression) -> tuple[NDArray[Any], NDArray[Any]]:
        at = places(stored.shape)
        return self.sampler.sample(expression, at), self.sampler.elements(stored, at)

    def _samples(self, stored: Stored) -> Iterator[tuple[_Group, NDArray[Any], bool]]:
        """For each orientation: its group, the initializer's sample for it, and which it is."""
        shape = _inner(stored.shape)
        for turned, is_turned in _orientations(shape):
            if stored.size and turned in self._by_shape:
                at = places(turned)
                here = swapped(at) if is_turned else at
                group = self._group(turned, stored.dtype)
                values = self.sampler.elements(stored, _outer(here, stored.shape))
                yield group, values, is_turned

    def _group(self, shape: Shape, dtype: np.dtype[Any]) -> _Group:
        key = (shape, dtype.name)
        if key not in self._groups:
            expressions = self._by_shape[shape]
            rows = [cast(self.sampler.sample(e, places(shape)), dtype) for e in expressions]
            exact: dict[bytes, list[int]] = {}
            for index, row in enumerate(rows):
                exact.setdefault(row.tobytes(), []).append(index)
            self._groups[key] = _Group(expressions, np.stack(rows), exact)
        return self._groups[key]


def shaped(expression: Expression, stored: Stored, turned: bool) -> Expression:
    """The expression transposed if `turned`, with the initializer's leading ones and dtype."""
    made = Transpose(expression) if turned else expression
    for _ in range(len(stored.shape) - len(_inner(stored.shape))):
        made = Stack((made,))
    return Cast(made, stored.dtype.name)


def _inner(shape: Shape) -> Shape:
    """A shape of more than two axes without its leading ones."""
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _outer(at: Places, shape: Shape) -> Places:
    missing = len(shape) - at.shape[1]
    return np.concatenate((np.zeros((len(at), missing), np.int64), at), axis=1)


def _orientations(shape: Shape) -> list[tuple[Shape, bool]]:
    return [(shape, False), (turn(shape), True)] if len(shape) > 1 else [(shape, False)]


def _is_constant(values: NDArray[Any]) -> bool:
    return bool(np.all(values == values[0]))


def _likeness(samples: NDArray[Any], values: NDArray[Any], tolerance: float) -> NDArray[np.float64]:
    """0 for what is unlike; else at most 1 for a multiple, more than 1 for equal elements."""
    varied = ~np.all(samples == samples[:, :1], axis=1)
    with np.errstate(all="ignore"):
        x, y = samples.astype(np.float64), values.astype(np.float64)
        allowed = tolerance * np.abs(x).max(axis=1, keepdims=True)
        votes = np.mean(np.abs(x - y) <= allowed, axis=1) * varied
        cosine = (x @ y) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y))
    cosine = np.where(np.isfinite(cosine) & varied & (len(values) > 7), np.abs(cosine), 0.0)
    return np.where(votes >= _VOTES, 1 + votes, np.where(cosine >= _COSINE, cosine, 0.0))
