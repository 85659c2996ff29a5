"""How parts of a model are named: `L9H6`, `L12N77`, `L3E5N17`, layer sets, regions of a tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from surgery.errors import RecipeError, quote

_HEAD = re.compile(r"L(\d{1,6})H(\d{1,6})")
_NEURON = re.compile(r"L(\d{1,6})(?:E(\d{1,6}))?N(\d{1,9})")
_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


@dataclass(frozen=True, order=True)
class Head:
    """Attention head `head` of layer `layer`, both from 0."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True, order=True)
class Neuron:
    """MLP neuron `neuron` of layer `layer`, both from 0: one input of the down projection.

    In a layer with experts, it is one of expert `expert`, from 0 too.
    """

    layer: int
    neuron: int
    expert: int | None = None

    def __str__(self) -> str:
        expert = "" if self.expert is None else f"E{self.expert}"
        return f"L{self.layer}{expert}N{self.neuron}"


def parse_head(text: str) -> Head:
    """`"L9H6"` as a `Head`; raises `RecipeError`."""
    match = _HEAD.fullmatch(text)
    if match is None:
        raise RecipeError(f"not a head address: {quote(text)}; expected one like L9H6")
    return Head(int(match[1]), int(match[2]))


def parse_neuron(text: str) -> Neuron:
    """`"L12N77"`, or `"L3E5N17"` of an expert, as a `Neuron`; raises `RecipeError`."""
    match = _NEURON.fullmatch(text)
    if match is None:
        raise RecipeError(
            f"not a neuron address: {quote(text)}; expected one like L12N77, with experts L3E5N17"
        )
    expert = None if match[2] is None else int(match[2])
    return Neuron(int(match[1]), int(match[3]), expert)


def parse_layers(layers: str | list[int] | tuple[int, ...], count: int) -> tuple[int, ...]:
    """A layer set (`"all"`, `[4, 5]`, `"4-9"`) as sorted indices below `count`.

    Raises `RecipeError` where the set is empty, malformed, repeats a layer or leaves the model.
    """
    if layers == "all":
        return tuple(range(count))
    if isinstance(layers, str):
        match = _RANGE.fullmatch(layers)
        if match is None:
            raise RecipeError(f"not a layer set: {quote(layers)}; expected all, [4, 5] or 4-9")
        first, last = int(match[1]), int(match[2] or match[1])
        _check_layer(last, count)
        layers = list(range(first, last + 1))
    for layer in layers:
        _check_layer(layer, count)
    if not layers:
        raise RecipeError("a layer set must name at least one layer")
    if len(set(layers)) != len(layers):
        raise RecipeError(f"a layer set must name each layer once, found {quote(list(layers))}")
    return tuple(sorted(layers))


def runs(indices: Iterable[int]) -> list[tuple[int, int]]:
    """Distinct `indices` as the fewest ranges `start` to `stop`, in order."""
    found: list[tuple[int, int]] = []
    for index in sorted(indices):
        if found and found[-1][1] == index:
            found[-1] = (found[-1][0], index + 1)
        else:
            found.append((index, index + 1))
    return found


def _check_layer(layer: int, count: int) -> None:
    if not 0 <= layer < count:
        raise RecipeError(f"layer {layer} is out of range; this model has layers 0 to {count - 1}")


@dataclass(frozen=True, order=True)
class Region:
    """A box of one tensor: `start[i] <= index[i] < stop[i]` on each axis, in stored order."""

    tensor: str
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: str, shape: tuple[int, ...]) -> Region:
        return cls(tensor, (0,) * len(shape), tuple(shape))

    @classmethod
    def band(cls, tensor: str, shape: tuple[int, ...], axis: int, start: int, stop: int) -> Region:
        """All of `tensor` but for `axis`, which runs from `start` to `stop`."""
        low, high = [0] * len(shape), list(shape)
        low[axis], high[axis] = start, stop
        return cls(tensor, tuple(low), tuple(high))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def overlaps(self, other: Region) -> bool:
        """Whether the two share an element."""
        axes = zip(self.start, self.stop, other.start, other.stop, strict=True)
        return self.tensor == other.tensor and all(max(a, c) < min(b, d) for a, b, c, d in axes)

    def intersection(self, other: Region) -> Region:
        """The box both share; only for regions that overlap."""
        start = tuple(map(max, self.start, other.start))
        return Region(self.tensor, start, tuple(map(min, self.stop, other.stop)))

    def within(self, outer: Region) -> tuple[slice, ...]:
        """The slices of this region in an array that holds just `outer`."""
        pairs = zip(self.slices, outer.start, strict=True)
        return tuple(slice(s.start - offset, s.stop - offset) for s, offset in pairs)

    def __str__(self) -> str:
        return f"{self.tensor}[{', '.join(f'{s.start}:{s.stop}' for s in self.slices)}]"
