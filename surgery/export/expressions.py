"""What an initializer is made of: an expression in checkpoint tensors, with numbers in bands.

Exporters transpose, cast, cut and join weights on their way into a graph. An `Expression` says
how, knows its shape and dtype from headers alone, and gives its numbers a band of whole rows (the
first axis) at a time, so that memory follows the band; only a transposition reads all it needs of
its operand.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Region
from surgery.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import numpy_dtype
from surgery.errors import InputError, quote
from surgery.export.casting import cast, float_dtype, turned

Shape = tuple[int, ...]
Span = tuple[int, int]

BAND_BYTES = 4 << 20


class Expression(ABC):
    """An array made of checkpoint tensors. `kind` is its transform's name in `lineage.json`."""

    kind: ClassVar[str]

    @abstractmethod
    def shape(self, checkpoint: Checkpoint) -> Shape:
        """Its sizes, from headers alone."""

    @abstractmethod
    def dtype(self, checkpoint: Checkpoint) -> np.dtype[Any]:
        """Its element type, from headers alone."""

    @abstractmethod
    def rows(self, checkpoint: Checkpoint, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` of the first axis; all of an array without axes."""

    @abstractmethod
    def operands(self) -> tuple[Expression, ...]:
        """The expressions it is made of; none for a tensor."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The expression as JSON, which `from_json` reads."""

    def read(self, checkpoint: Checkpoint) -> NDArray[Any]:
        """The whole array."""
        shape = self.shape(checkpoint)
        return self.rows(checkpoint, 0, shape[0] if shape else 0)

    def stream(self, checkpoint: Checkpoint, limit: int = BAND_BYTES) -> Iterator[NDArray[Any]]:
        """Its rows from the first to the last, in the bands of `bands`; no tensor is read twice."""
        for start, stop in self.bands(checkpoint, limit):
            yield self.rows(checkpoint, start, stop)

    def bands(self, checkpoint: Checkpoint, limit: int = BAND_BYTES) -> Iterator[Span]:
        """Ranges of rows of at most `limit` bytes each, one row at least, that cover it all."""
        shape = self.shape(checkpoint)
        rows = shape[0] if shape else 0
        size = math.prod(shape) * self.dtype(checkpoint).itemsize
        height = max(1, limit * rows // size if size else rows)
        for start in range(0, max(1, rows), height):
            yield start, min(start + height, rows)

    def tensors(self) -> tuple[str, ...]:
        """The names of the checkpoint tensors in it, each once, in order."""
        names = (name for operand in self.operands() for name in operand.tensors())
        return tuple(dict.fromkeys(names))


Expressions = dict[str, Expression]
"""Initializer name to what it is made of: in parameters, or, once bound, in checkpoint tensors."""


@dataclass(frozen=True)
class Tensor(Expression):
    """A checkpoint tensor as it is stored."""

    kind: ClassVar[str] = "none"
    name: str

    def shape(self, checkpoint: Checkpoint) -> Shape:
        return checkpoint.info(self.name).shape

    def dtype(self, checkpoint: Checkpoint) -> np.dtype[Any]:
        return numpy_dtype(checkpoint.info(self.name).dtype)

    def rows(self, checkpoint: Checkpoint, start: int, stop: int) -> NDArray[Any]:
        shape = self.shape(checkpoint)
        whole = Region.whole(self.name, shape)
        band = Region.band(self.name, shape, 0, start, stop) if shape else whole
        return checkpoint.read_rows(self.name, band)

    def operands(self) -> tuple[Expression, ...]:
        return ()

    def to_json(self) -> dict[str, Any]:
        return {"tensor": self.name}

    def tensors(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass(frozen=True)
class Cast(Expression):
    """`of` in another float type (numpy's name of it), rounded once to nearest-even."""

    kind: ClassVar[str] = "cast"
    of: Expression
    to: str

    def shape(self, checkpoint: Checkpoint) -> Shape:
        return self.of.shape(checkpoint)

    def dtype(self, checkpoint: Checkpoint) -> np.dtype[Any]:
        return float_dtype(self.to)

    def rows(self, checkpoint: Checkpoint, start: int, stop: int) -> NDArray[Any]:
        return cast(self.of.rows(checkpoint, start, stop), float_dtype(self.to))

    def stream(self, checkpoint: Checkpoint, limit: int = BAND_BYTES) -> Iterator[NDArray[Any]]:
        for band in self.of.stream(checkpoint, limit):
            yield cast(band, float_dtype(self.to))

    def operands(self) -> tuple[Expression, ...]:
        return (self.of,)

    def to_json(self) -> dict[str, Any]:
        return {"cast": self.of.to_json(), "to": self.to}


@dataclass(frozen=True)
class Transpose(Expression):
    """`of` with its last two axes swapped; raises `InputError` where it has fewer."""

    kind: ClassVar[str] = "transpose"
    of: Expression

    def shape(self, checkpoint: Checkpoint) -> Shape:
        shape = self.of.shape(checkpoint)
        if len(shape) < 2:
            raise InputError(f"a transposition needs two axes; found {list(shape)}")
        return (*shape[:-2], shape[-1], shape[-2])

    def dtype(self, checkpoint: Checkpoint) -> np.dtype[Any]:
        return self.of.dtype(checkpoint)

    def rows(self, checkpoint: Checkpoint, start: int, stop: int) -> NDArray[Any]:
        if len(self.shape(checkpoint)) > 2:
            return np.ascontiguousarray(self.of.rows(checkpoint, start, stop).swapaxes(-1, -2))
        return turned(self.of.read(checkpoint)[:, start:stop])

    def stream(self, checkpoint: Checkpoint, limit: int = BAND_BYTES) -> Iterator[NDArray[Any]]:
        if len(self.shape(checkpoint)) > 2:
            yield from super().stream(checkpoint, limit)
            return
        whole = self.of.read(checkpoint)
        for start, stop in self.bands(checkpoint, limit):
            yield turned(whole[:, start:stop])

    def operands(self) -> tuple[Expression, ...]:
        return (self.of,)

    def to_json(self) -> dict[str, Any]:
        return {"transpose": self.of.to_json()}


@dataclass(frozen=True)
class Slice(Expression):
    """Indices `start` to `stop` of one axis of `of`."""

    kind: ClassVar[str] = "slice"
    of: Expression
    axis: int
    start: int
    stop: int

    def shape(self, checkpoint: Checkpoint) -> Shape:
        shape = self.of.shape(checkpoint)
        return (*shape[: self.axis], self.stop - self.start, *shape[self.axis + 1 :])

    def dtype(self, checkpoint: Checkpoint) -> np.dtype[Any]:
        return self.of.dtype(checkpoint)

    def rows(self, checkpoint: Checkpoint, start: int, stop: int) -> NDArray[Any]:
        if self.axis == 0:
            return self.of.rows(checkpoint, self.start + start, self.start + stop)
        band = self.of.rows(checkpoint, start, stop)
        return band[(slice(None),) * self.axis + (slice(self.start, self.stop),)]

    def operands(self) -> tuple[Expression, ...]:
        return (self.of,)

    def to_json(self) -> dict[str, Any]:
        return {
            "slice": self.of.to_json(),
            "axis": self.axis,
            "start": self.start,
            "stop": self.stop,
        }


@dataclass(frozen=True)
class Concat(Expression):
    """`parts` one after the other along `axis`."""

    kind: ClassVar[str] = "concatenation"
    parts: tuple[Expression, ...]
    axis: int = 0

    def shape(self, checkpoint: Checkpoint) -> Shape:
        shapes = [part.shape(checkpoint) for part in self.parts]
        size = sum(shape[self.axis] for shape in shapes)
        return (*shapes[0][: self.axis], size, *shapes[0][self.axis + 1 :])

    def dtype(self, checkpoint: Checkpoint) -> np.dtype[Any]:
        return self.parts[0].dtype(checkpoint)

    def rows(self, checkpoint: Checkpoint, start: int, stop: int) -> NDArray[Any]:
        if self.axis:
            bands = [part.rows(checkpoint, start, stop) for part in self.parts]
            return np.concatenate(bands, axis=self.axis)
        bands, first = [], 0
        for part in self.parts:
            size = part.shape(checkpoint)[0]
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                bands.append(part.rows(checkpoint, low, high))
            first += size
        return np.concatenate(bands) if len(bands) > 1 else bands[0]

    def operands(self) -> tuple[Expression, ...]:
        return self.parts

    def to_json(self) -> dict[str, Any]:
        return {"concatenation": [part.to_json() for part in self.parts], "axis": self.axis}


@dataclass(frozen=True)
class Stack(Expression):
    """`parts` of one shape along a new first axis."""

    kind: ClassVar[str] = "stack"
    parts: tuple[Expression, ...]

    def shape(self, checkpoint: Checkpoint) -> Shape:
        return (len(self.parts), *self.parts[0].shape(checkpoint))

    def dtype(self, checkpoint: Checkpoint) -> np.dtype[Any]:
        return self.parts[0].dtype(checkpoint)

    def rows(self, checkpoint: Checkpoint, start: int, stop: int) -> NDArray[Any]:
        return np.stack([part.read(checkpoint) for part in self.parts[start:stop]])

    def operands(self) -> tuple[Expression, ...]:
        return self.parts

    def to_json(self) -> dict[str, Any]:
        return {"stack": [part.to_json() for part in self.parts]}


@dataclass(frozen=True)
class Item(Expression):
    """Entry `index` of the first axis of `of`, without that axis."""

    kind: ClassVar[str] = "item"
    of: Expression
    index: int

    def shape(self, checkpoint: Checkpoint) -> Shape:
        return self.of.shape(checkpoint)[1:]

    def dtype(self, checkpoint: Checkpoint) -> np.dtype[Any]:
        return self.of.dtype(checkpoint)

    def rows(self, checkpoint: Checkpoint, start: int, stop: int) -> NDArray[Any]:
        [item] = self.of.rows(checkpoint, self.index, self.index + 1)
        found: NDArray[Any] = item[start:stop] if item.ndim else item
        return found

    def operands(self) -> tuple[Expression, ...]:
        return (self.of,)

    def to_json(self) -> dict[str, Any]:
        return {"item": self.of.to_json(), "index": self.index}


@dataclass(frozen=True)
class Fold(Expression):
    """`of` · `factor` + `offset`, computed in float32: constants that an optimiser multiplied in.

    A factor of 1 and an offset of 0 are left out, so that they change no bit.
    """

    kind: ClassVar[str] = "folded expression"
    of: Expression
    factor: float = 1.0
    offset: float = 0.0

    def shape(self, checkpoint: Checkpoint) -> Shape:
        return self.of.shape(checkpoint)

    def dtype(self, checkpoint: Checkpoint) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def rows(self, checkpoint: Checkpoint, start: int, stop: int) -> NDArray[Any]:
        return self.apply(self.of.rows(checkpoint, start, stop))

    def apply(self, values: NDArray[Any]) -> NDArray[Any]:
        """The constants folded into numbers of `of`."""
        values = cast(values, np.dtype(np.float32))
        with np.errstate(over="ignore", invalid="ignore"):
            values = values if self.factor == 1 else values * np.float32(self.factor)
            return values if self.offset == 0 else values + np.float32(self.offset)

    def operands(self) -> tuple[Expression, ...]:
        return (self.of,)

    def to_json(self) -> dict[str, Any]:
        return {"fold": self.of.to_json(), "factor": self.factor, "offset": self.offset}


def transpose(of: Expression) -> Expression:
    """`Transpose(of)`; twice is not at all."""
    return of.of if isinstance(of, Transpose) else Transpose(of)


def item(of: Expression, index: int) -> Expression:
    """`Item(of, index)`, without the stack it is taken from."""
    if isinstance(of, Stack):
        return of.parts[index]
    if isinstance(of, Transpose):
        return transpose(item(of.of, index))
    return Item(of, index)


def substitute(expression: Expression, known: Mapping[str, Expression]) -> Expression:
    """`expression` with what `known` says in place of each tensor; `KeyError` where it does not."""
    if isinstance(expression, Tensor):
        return known[expression.name]
    parts = tuple(substitute(operand, known) for operand in expression.operands())
    match expression:
        case Concat() | Stack():
            return replace(expression, parts=parts)
        case Cast() | Fold() | Slice():
            return replace(expression, of=parts[0])
        case Transpose():
            return transpose(parts[0])
        case Item():
            return item(parts[0], expression.index)
    raise TypeError(f"{type(expression).__name__} is no expression")


def kinds(expression: Expression) -> tuple[str, ...]:
    """The transforms of an expression from the tensors outwards, each once; `none` for a tensor
    as it is stored."""
    found: list[str] = []
    queue: Sequence[Expression] = (expression,)
    while queue:
        found += [item.kind for item in queue if not isinstance(item, Tensor)]
        queue = [operand for item in queue for operand in item.operands()]
    return tuple(dict.fromkeys(reversed(found))) or (Tensor.kind,)


def from_json(fields: Mapping[str, Any]) -> Expression:
    """The expression that `to_json` wrote; raises `InputError` for anything else."""
    try:
        return _parse(fields)
    except (KeyError, TypeError, ValueError, RecursionError):
        raise InputError(f"is not an expression in tensors: {quote(fields, 200)}") from None


def _parse(fields: Mapping[str, Any]) -> Expression:
    if "tensor" in fields:
        return Tensor(str(fields["tensor"]))
    if "cast" in fields:
        return Cast(_parse(fields["cast"]), str(fields["to"]))
    if "transpose" in fields:
        return Transpose(_parse(fields["transpose"]))
    if "item" in fields:
        return Item(_parse(fields["item"]), int(fields["index"]))
    if "slice" in fields:
        numbers = (int(fields[key]) for key in ("axis", "start", "stop"))
        return Slice(_parse(fields["slice"]), *numbers)
    if "concatenation" in fields:
        return Concat(tuple(map(_parse, fields["concatenation"])), int(fields["axis"]))
    if "fold" in fields:
        return Fold(_parse(fields["fold"]), float(fields["factor"]), float(fields["offset"]))
    return Stack(tuple(map(_parse, fields["stack"])))
