"""Running sums over batches: conversion error against noise, and the interaction term.

All sums are in float64. A runtime's error is taken against the float64 reference and divided by
PyTorch's own float32 error against it, as the Neuron accuracy framework does; the error between
the two runtimes themselves is reported beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.metrics.ratio import divide
from surgery.metrics.shape import ShapeSums, position_scale
from surgery.metrics.tolerance import ToleranceSums

Floats = NDArray[np.floating[Any]]

HALF_ULP = 2.0**-24
"""Unit roundoff of float32: no float32 result can be trusted closer than this to its value."""

UNITS = {"float32": HALF_ULP, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Unit roundoff of each type that a graph computes in."""


@dataclass
class Spread:
    """Largest absolute value, sum of squares and count of values seen so far."""

    largest: float = 0.0
    squares: float = 0.0
    total: float = 0.0
    count: int = 0

    def add(self, values: Floats) -> None:
        wide = np.abs(np.asarray(values, np.float64))
        # np.max keeps NaN, which max() of Python would drop.
        self.largest = float(np.max([self.largest, wide.max(initial=0.0)]))
        self.squares += float(np.square(wide).sum())
        self.total += float(wide.sum())
        self.count += wide.size

    @property
    def l2(self) -> float:
        return float(np.sqrt(self.squares))

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else float("nan")


@dataclass
class ConversionSums:
    """PyTorch float32 `t`, the float64 `reference` and ONNX Runtime `r`, batch by batch.

    `dtype` is what the graph computes in. Where that is not float32, noise is what PyTorch makes
    in that type.
    """

    dtype: str = "float32"
    difference: Spread = field(default_factory=Spread)
    relative: Spread = field(default_factory=Spread)
    noise: Spread = field(default_factory=Spread)
    error: Spread = field(default_factory=Spread)
    scale: Spread = field(default_factory=Spread)
    dot: float = 0.0
    t_squares: float = 0.0
    r_squares: float = 0.0
    positions: int = 0
    ratio_position: float = 0.0
    worst: tuple[float, str] = (-1.0, "")
    shape: ShapeSums = field(default_factory=ShapeSums)
    tolerance: ToleranceSums = field(default_factory=ToleranceSums)

    def add(
        self,
        where: list[str],
        t: Floats,
        reference: Floats,
        r: Floats,
        narrow: Floats | None = None,
    ) -> None:
        """Adds arrays [n, features]; `where[i]` names position i; `narrow` is PyTorch in `dtype`,
        where that is not float32."""
        wide_t, wide_r = np.asarray(t, np.float64), np.asarray(r, np.float64)
        difference = wide_r - wide_t
        self.difference.add(difference)
        # Relative to the position's largest value: single logits pass through zero.
        span = np.abs(wide_t).max(axis=-1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.relative.add(np.where(difference == 0, 0.0, difference / span))
        self.positions += len(wide_t)
        noise = np.asarray(t if narrow is None else narrow, np.float64) - reference
        error = wide_r - reference
        self.noise.add(noise)
        self.error.add(error)
        self.scale.add(reference)
        self.dot += float((wide_t * wide_r).sum())
        self.t_squares += float(np.square(wide_t).sum())
        self.r_squares += float(np.square(wide_r).sum())
        self._note_worst(where, np.abs(difference).max(axis=-1))
        self._note_position(noise, error, np.asarray(reference, np.float64))
        self.tolerance.add(wide_t, wide_r)

    def _note_position(self, noise: Floats, error: Floats, reference: Floats) -> None:
        """Keeps the largest error of one position over that position's own noise, in L2, and adds
        to the distributions of both.

        One noisy position would hide an error elsewhere from the other two ratios.
        """
        scale = position_scale(noise, reference, UNITS[self.dtype])
        errors = np.linalg.norm(error, axis=-1) / np.sqrt(max(error.shape[-1], 1))
        self.ratio_position = float(np.max([self.ratio_position, *map(divide, errors, scale)]))
        self.shape.add(noise, error, scale)

    def _note_worst(self, where: list[str], largest: NDArray[np.float64]) -> None:
        # A NaN is worse than any number.
        order = np.where(np.isnan(largest), np.inf, largest)
        index = int(order.argmax())
        if order[index] > self.worst[0]:
            self.worst = (float(order[index]), where[index])

    @property
    def noise_max(self) -> float:
        """PyTorch's largest error, and never less than rounding the result itself makes."""
        return max(self.noise.largest, UNITS[self.dtype] * self.scale.largest)

    @property
    def noise_l2(self) -> float:
        return max(self.noise.l2, UNITS[self.dtype] * self.scale.l2)

    @property
    def cosine(self) -> float:
        norm = np.sqrt(self.t_squares) * np.sqrt(self.r_squares)
        return float(self.dot / norm) if norm else float("nan")

    @property
    def ratio_max(self) -> float:
        return divide(self.error.largest, self.noise_max)

    @property
    def ratio_l2(self) -> float:
        return divide(self.error.l2, self.noise_l2)


@dataclass
class InteractionSums:
    """I = (R_e - R_o) - (T_e - T_o) and E = T_e - T_o, with the noise of all four corners; `dtype`
    is the narrowest that a graph computes in."""

    dtype: str = "float32"
    effect: Spread = field(default_factory=Spread)
    interaction: Spread = field(default_factory=Spread)
    noise: Spread = field(default_factory=Spread)
    scale: Spread = field(default_factory=Spread)
    dot: float = 0.0

    def add(
        self,
        corners: dict[str, Floats],
        references: dict[str, Floats],
        narrow: Mapping[str, Floats] = MappingProxyType({}),
    ) -> None:
        """`corners` holds T_o, T_e, R_o, R_e, `references` the float64 T_o and T_e, and `narrow`
        those of them that a graph computes in another type than float32."""
        wide = {name: np.asarray(values, np.float64) for name, values in corners.items()}
        effect = wide["T_e"] - wide["T_o"]
        interaction = (wide["R_e"] - wide["R_o"]) - effect
        self.effect.add(effect)
        self.interaction.add(interaction)
        self.dot += float((interaction * effect).sum())
        for name, reference in references.items():
            self.noise.add(np.asarray(narrow.get(name, wide[name]), np.float64) - reference)
            self.scale.add(reference)

    @property
    def noise_l2(self) -> float:
        return max(self.noise.l2, UNITS[self.dtype] * self.scale.l2)

    @property
    def ratio(self) -> float:
        return divide(self.interaction.l2, self.effect.l2)

    @property
    def rho(self) -> float:
        return divide(self.dot, self.effect.squares)

    @property
    def noise_ratio(self) -> float:
        return divide(self.interaction.l2, self.noise_l2)
