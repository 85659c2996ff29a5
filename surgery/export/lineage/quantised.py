"""Weights in 8 bits, as `onnxruntime.quantization.quantize_dynamic` rounds them.

X becomes `X_quantized`, `X_scale` and `X_zero_point`. Scale and zero point follow from the range of
X, of all of it or of each channel, and from three choices: signed, symmetric, reduced range
(onnxruntime, quantization/quant_utils.py, `compute_scale_zp` and `quantize_nparray`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint import Checkpoint
from surgery.export.expressions import Expression, Shape
from surgery.export.lineage.stored import Stored

SUFFIX = "_quantized"
_RANGES = {
    # dtype, symmetric, reduced: the integers of that choice
    ("int8", False, False): (-128, 127),
    ("int8", True, False): (-127, 127),
    ("int8", False, True): (-64, 64),
    ("int8", True, True): (-64, 64),
    ("uint8", False, False): (0, 255),
    ("uint8", True, False): (0, 255),
    ("uint8", False, True): (0, 127),
    ("uint8", True, True): (0, 127),
}
_BAND = 4 << 20


@dataclass(frozen=True)
class Packed:
    """The three initializers of one weight."""

    values: Stored
    scale: Stored
    zero_point: Stored

    @property
    def base(self) -> str:
        """The name the weight had."""
        return self.values.name.removesuffix(SUFFIX)

    @property
    def names(self) -> tuple[str, str, str]:
        return self.values.name, self.scale.name, self.zero_point.name

    @property
    def is_sound(self) -> bool:
        """Whether the three can belong together."""
        integers = self.values.dtype.name in ("int8", "uint8") and bool(self.values.shape)
        alike = self.zero_point.dtype == self.values.dtype and self.scale.is_float
        return integers and alike and self.zero_point.size == self.scale.size

    def axis(self) -> int | None:
        """The axis of its channels; None where one scale serves all."""
        count = self.scale.size
        if not self.scale.shape or (count == 1 and self.values.shape[-1] != 1):
            return None
        axes = [axis for axis in (1, 0) if axis < len(self.values.shape)]
        return next((axis for axis in axes if self.values.shape[axis] == count), None)


def packed(initializers: Mapping[str, Stored]) -> Iterator[Packed]:
    """Every weight that the graph holds in 8 bits."""
    for name, values in initializers.items():
        base = name.removesuffix(SUFFIX)
        scale, zero = (initializers.get(f"{base}_{part}") for part in ("scale", "zero_point"))
        if name == base or scale is None or zero is None:
            continue
        weight = Packed(values, scale, zero)
        if weight.is_sound:
            yield weight


class Dequantised(Stored):
    """The numbers that 8-bit values stand for: near the weight, not equal to it."""

    def __init__(self, source: Packed) -> None:
        super().__init__(source.values.name, np.dtype(np.float32), source.values.shape)
        object.__setattr__(self, "_source", source)

    def elements(self, flat: NDArray[np.int64]) -> NDArray[Any]:
        source: Packed = self.__dict__["_source"]
        axis = source.axis()
        channel = 0 if axis is None else np.unravel_index(flat, self.shape)[axis]
        scale, zero = (
            side.read().reshape(-1)[channel].astype(np.float32)
            for side in (source.scale, source.zero_point)
        )
        values = source.values.elements(flat).astype(np.float32)
        return np.asarray((values - zero) * scale, np.float32)


@dataclass(frozen=True, eq=False)
class Quantise(Expression):
    """`of` in 8 bits: rounded to `scale` and `zero_point`, one each or one for each channel."""

    kind: ClassVar[str] = "quantised"
    of: Expression
    to: str
    axis: int | None
    symmetric: bool
    reduced: bool
    scale: NDArray[np.float32]
    zero_point: NDArray[Any]

    def shape(self, checkpoint: Checkpoint) -> Shape:
        return self.of.shape(checkpoint)

    def dtype(self, checkpoint: Checkpoint) -> np.dtype[Any]:
        return np.dtype(self.to)

    def rows(self, checkpoint: Checkpoint, start: int, stop: int) -> NDArray[Any]:
        values = self.of.rows(checkpoint, start, stop).astype(np.float32, copy=False)
        scale, zero = (self._spread(side, start, stop) for side in (self.scale, self.zero_point))
        limits = np.iinfo(self.to)
        with np.errstate(all="ignore"):
            rounded = np.round(values / scale) + zero
            clipped: NDArray[Any] = np.clip(rounded, limits.min, limits.max).astype(self.to)
        return clipped

    def _spread(self, channels: NDArray[Any], start: int, stop: int) -> NDArray[Any]:
        if self.axis is None:
            return channels.reshape(())
        return channels[start:stop, None] if self.axis == 0 else channels

    def operands(self) -> tuple[Expression, ...]:
        return (self.of,)

    def to_json(self) -> dict[str, Any]:
        return {
            "quantised": self.of.to_json(),
            "to": self.to,
            "axis": self.axis,
            "symmetric": self.symmetric,
            "reduced": self.reduced,
        }


def schemes(source: Packed, of: Expression, checkpoint: Checkpoint) -> Iterator[Quantise]:
    """What `quantize_dynamic` makes of `of` for each choice that it has."""
    axis, to = source.axis(), source.values.dtype.name
    low, high = _extremes(of, axis, checkpoint)
    for symmetric, reduced in product((True, False), (False, True)):
        scale, zero = _parameters(low, high, to, symmetric, reduced)
        yield Quantise(of, to, axis, symmetric, reduced, scale, zero)


def same_parameters(source: Packed, scheme: Quantise) -> bool:
    """Whether scale and zero point are, bit for bit, those of the scheme."""
    pairs = ((source.scale, scheme.scale), (source.zero_point, scheme.zero_point))
    return all(
        found.read().tobytes() == wanted.astype(found.dtype).tobytes() for found, wanted in pairs
    )


def _extremes(
    of: Expression, axis: int | None, checkpoint: Checkpoint
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Smallest and largest number, of each channel where there are some, and zero."""
    shape = of.shape(checkpoint)
    step = max(1, _BAND // max(1, int(np.prod(shape[1:]))))
    lows, highs = [], []
    for start in range(0, shape[0], step):
        band = of.rows(checkpoint, start, min(start + step, shape[0])).astype(np.float32)
        others = tuple(a for a in range(band.ndim) if a != axis)
        lows.append(band.min(axis=others))
        highs.append(band.max(axis=others))
    join = np.concatenate if axis == 0 else np.stack
    low, high = join(lows), join(highs)
    if axis != 0:
        low, high = low.min(axis=0), high.max(axis=0)
    zero = np.float32(0)
    return np.minimum(low, zero).reshape(-1), np.maximum(high, zero).reshape(-1)


def _parameters(
    low: NDArray[np.float32], high: NDArray[np.float32], to: str, symmetric: bool, reduced: bool
) -> tuple[NDArray[np.float32], NDArray[Any]]:
    least, most = _RANGES[to, symmetric, reduced]
    if symmetric:
        high = np.maximum(np.abs(low), np.abs(high))
        low = -high
    scale = (high.astype(np.float64) - low.astype(np.float64)) / float(most - least)
    with np.errstate(all="ignore"):
        middle = np.round((least + most) / 2.0)
        zero = np.full_like(scale, middle) if symmetric else np.round(least - low / scale)
    empty = scale < np.finfo(np.float32).tiny
    zero = np.where(empty, 0.0, zero)
    return np.where(empty, 1.0, scale).astype(np.float32), zero.astype(to)
