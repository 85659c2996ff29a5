"""The shape of an error's distribution, streamed: a histogram of signed magnitudes, and moments.

As the Neuron accuracy framework does, the error of ONNX Runtime is compared with noise not only by
its size but by its distribution: the Bhattacharyya coefficient of both histograms, and the ratio
of their sigmas. Errors come in units of their position's own noise, so that positions of large and
of small numbers can be added to one distribution.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.metrics.ratio import divide

Floats = NDArray[np.floating[Any]]
Counts = NDArray[np.int64]

OCTAVES = 24
"""Magnitudes from 2^-24 to 2^24 have bins; what is smaller counts as zero."""

PER_OCTAVE = 4

SIDE = 2 * OCTAVES * PER_OCTAVE + 1
"""Bins of one sign, the last for all that is larger."""

BINS = 2 * SIDE + 2
"""Negative bins, the largest first; zero; positive bins; and one for what is no number."""

_ZERO = SIDE


@dataclass
class Histogram:
    """Signed values by sign and magnitude, in fixed bins: histograms of parts add up."""

    counts: Counts = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, values: Floats) -> None:
        self.counts += np.bincount(bins(values), minlength=BINS)

    def merge(self, other: Histogram) -> None:
        self.counts += other.counts

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def magnitudes(self, shares: Iterable[float]) -> tuple[float, ...]:
        """The quantiles of the absolute value, to a quarter of an octave: log-linear in a bin.

        NaN of no value, and where the share falls to what is no number; infinite beyond 2^24.
        """
        sides = self.counts[_ZERO - 1 :: -1] + self.counts[_ZERO + 1 : -1]
        cumulative = np.concatenate([[self.counts[_ZERO]], sides]).cumsum()
        return tuple(_magnitude(cumulative, share * self.total, self.total) for share in shares)


def bins(values: Floats) -> NDArray[np.intp]:
    """The bin of each value, flat."""
    flat = np.asarray(values, np.float64).reshape(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.floor((np.log2(np.abs(flat)) + OCTAVES) * PER_OCTAVE)
    nan = np.isnan(flat)
    place = np.clip(np.where(nan, -1, steps), -1, SIDE - 1).astype(np.intp) + 1
    found: NDArray[np.intp] = np.where(flat < 0, _ZERO - place, _ZERO + place)
    return np.where(nan, BINS - 1, found)


def _magnitude(cumulative: Counts, rank: float, total: int) -> float:
    if total == 0 or rank > cumulative[-1]:
        return float("nan")
    index = int(np.searchsorted(cumulative, rank))
    if index == 0:
        return 0.0
    if index == SIDE:
        return float("inf")
    before = int(cumulative[index - 1])
    within = (rank - before) / (int(cumulative[index]) - before)
    return float(2.0 ** ((index - 1 + within) / PER_OCTAVE - OCTAVES))


def overlap(p: Histogram, q: Histogram) -> float:
    """The Bhattacharyya coefficient, the sum of sqrt(p q) over bins: 1 for equal distributions, 0
    for ones that share no bin; NaN where one is empty. (Bhattacharyya 1943.)"""
    if not (p.total and q.total):
        return float("nan")
    shares = (p.counts / p.total) * (q.counts / q.total)
    return min(1.0, float(np.sqrt(shares).sum()))


@dataclass
class Distribution:
    """Errors in units of noise: histogram, mean and the root mean square about zero.

    `sigma` is about zero, which is the reference's own value, so that a bias counts.
    """

    histogram: Histogram = field(default_factory=Histogram)
    sum: float = 0.0
    squares: float = 0.0
    largest: float = 0.0

    def add(self, values: Floats) -> None:
        wide = np.asarray(values, np.float64)
        self.histogram.add(wide)
        with np.errstate(invalid="ignore", over="ignore"):
            self.sum += float(wide.sum())
            self.squares += float(np.square(wide).sum())
        # np.max keeps NaN, which max() of Python would drop.
        self.largest = float(np.max([self.largest, np.abs(wide).max(initial=0.0)]))

    def merge(self, other: Distribution) -> None:
        self.histogram.merge(other.histogram)
        self.sum += other.sum
        self.squares += other.squares
        self.largest = float(np.max([self.largest, other.largest]))

    @property
    def mean(self) -> float:
        return divide(self.sum, self.histogram.total)

    @property
    def sigma(self) -> float:
        return float(np.sqrt(divide(self.squares, self.histogram.total)))


@dataclass
class ShapeSums:
    """The noise and the error of one output, both divided by each position's own noise."""

    noise: Distribution = field(default_factory=Distribution)
    error: Distribution = field(default_factory=Distribution)

    def add(self, noise: Floats, error: Floats, scale: Floats) -> None:
        """Adds arrays [n, features]; `scale` [n] is the noise of each position (no unit: the root
        mean square over its features)."""
        self.noise.add(in_units(noise, scale))
        self.error.add(in_units(error, scale))

    @property
    def overlap(self) -> float:
        return overlap(self.noise.histogram, self.error.histogram)

    @property
    def sigma_ratio(self) -> float:
        return divide(self.error.sigma, self.noise.sigma)


def position_scale(noise: Floats, reference: Floats, unit: float) -> NDArray[np.float64]:
    """The noise of each position of arrays [n, features], a root mean square over its features.

    At least four roundings of the position's own values, `unit` being the unit roundoff: with
    fewer, two correct runtimes differ by chance.
    """
    least = 4 * unit * np.linalg.norm(reference, axis=-1)
    norms = np.maximum(np.linalg.norm(noise, axis=-1), least)
    return np.asarray(norms / np.sqrt(max(noise.shape[-1], 1)))


def shape_of(noisy: Floats, found: Floats, reference: Floats, unit: float) -> tuple[float, float]:
    """Overlap and sigma ratio of arrays [n, features]: PyTorch's, ONNX Runtime's, the reference."""
    sums = ShapeSums()
    with np.errstate(invalid="ignore", over="ignore"):
        noise, error = noisy - reference, found - reference
        sums.add(noise, error, position_scale(noise, reference, unit))
    return sums.overlap, sums.sigma_ratio


def in_units(errors: Floats, scale: Floats) -> Floats:
    """Each row of `errors` [n, features] over its `scale` [n]; 0 / 0 is 0, as no error is none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(errors == 0, 0.0, errors / np.asarray(scale)[:, None])
