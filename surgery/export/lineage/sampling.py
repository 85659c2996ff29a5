"""A few elements of an array or an expression, at places that its shape alone decides.

Two arrays with the same bits there are worth comparing whole; two with most of them may be one
that was damaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from surgery.errors import InputError
from surgery.export.casting import cast, float_dtype
from surgery.export.expressions import (
    Cast,
    Concat,
    Expression,
    Fold,
    Item,
    Shape,
    Slice,
    Stack,
    Tensor,
    Transpose,
)
from surgery.export.lineage.stored import Stored

COUNT = 16
"""Elements of a sample; fewer only where an array has fewer."""

Places = NDArray[np.int64]


@lru_cache(maxsize=4096)
def places(shape: Shape) -> Places:
    """[elements, axes]: where an array of this shape is sampled; everywhere if it is small.

    A matrix and its transpose are sampled at the same elements, which are then read once.
    """
    if len(shape) > 1 and shape[-2] > shape[-1]:
        return swapped(places(turn(shape)))
    size = int(np.prod(shape, dtype=np.int64))
    if size <= COUNT:
        flat = np.arange(size)
    else:
        flat = np.random.default_rng(size).integers(0, size, COUNT)
    return np.stack(np.unravel_index(flat, shape), axis=-1).astype(np.int64)


class Sampler:
    """Elements of arrays, and of expressions in the tensors `tensors`; each is read once."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self._tensors = tensors
        self._read: dict[tuple[object, ...], NDArray[np.generic]] = {}

    def shape(self, expression: Expression) -> Shape:
        """The shape of an expression, without another look at the checkpoint."""
        if isinstance(expression, Tensor):
            return self._tensors[expression.name].shape
        shapes = [self.shape(operand) for operand in expression.operands()]
        return _shape(expression, shapes)

    def elements(self, stored: Stored, at: Places) -> NDArray[np.generic]:
        """The elements of an array at places [elements, axes]."""
        flat = np.ravel_multi_index(tuple(at.T), stored.shape)
        key = (stored.path, stored.name, flat.tobytes())
        if key not in self._read:
            self._read[key] = stored.elements(flat)
        return self._read[key]

    def sample(self, expression: Expression, at: Places) -> NDArray[np.generic]:
        """The elements of an expression at places [elements, axes], in its own dtype."""
        if isinstance(expression, Tensor):
            return self.elements(self._tensors[expression.name], at)
        if isinstance(expression, Cast):
            return cast(self.sample(expression.of, at), float_dtype(expression.to))
        if isinstance(expression, Fold):
            return expression.apply(self.sample(expression.of, at))
        if isinstance(expression, Transpose):
            return self.sample(expression.of, swapped(at))
        if isinstance(expression, Slice):
            moved = at.copy()
            moved[:, expression.axis] += expression.start
            return self.sample(expression.of, moved)
        if isinstance(expression, Item):
            index = np.full((len(at), 1), expression.index, np.int64)
            return self.sample(expression.of, np.concatenate((index, at), axis=1))
        if isinstance(expression, Stack):
            return self._gather(expression.parts, at[:, 0], at[:, 1:])
        if isinstance(expression, Concat):
            return self._joined(expression, at)
        raise InputError(f"no sample of {type(expression).__name__}")

    def _joined(self, joined: Concat, at: Places) -> NDArray[np.generic]:
        sizes = [self.shape(part)[joined.axis] for part in joined.parts]
        ends = np.cumsum(sizes)
        which = np.searchsorted(ends, at[:, joined.axis], side="right")
        inner = at.copy()
        inner[:, joined.axis] -= np.concatenate(([0], ends))[which]
        return self._gather(joined.parts, which, inner)

    def _gather(
        self, parts: tuple[Expression, ...], which: Places, inner: Places
    ) -> NDArray[np.generic]:
        """For each row of `inner`, the element of the part that `which` names."""
        found: dict[int, NDArray[np.generic]] = {}
        for part in np.unique(which).tolist():
            found[part] = self.sample(parts[part], inner[which == part])
        dtype = next(iter(found.values())).dtype
        values = np.empty(len(which), dtype)
        for part, sampled in found.items():
            values[which == part] = sampled
        return values


def swapped(at: Places) -> Places:
    """The same places in an array whose last two axes are swapped."""
    turned = at.copy()
    turned[:, [-1, -2]] = at[:, [-2, -1]]
    return turned


def turn(shape: Shape) -> Shape:
    """A shape with its last two sizes swapped."""
    return (*shape[:-2], shape[-1], shape[-2])


def _shape(expression: Expression, shapes: list[Shape]) -> Shape:
    first = shapes[0]
    if isinstance(expression, Transpose):
        return turn(first)
    if isinstance(expression, Item):
        return first[1:]
    if isinstance(expression, Slice):
        axis = expression.axis
        return (*first[:axis], expression.stop - expression.start, *first[axis + 1 :])
    if isinstance(expression, Concat):
        axis = expression.axis
        return (*first[:axis], sum(shape[axis] for shape in shapes), *first[axis + 1 :])
    return (len(shapes), *first) if isinstance(expression, Stack) else first
