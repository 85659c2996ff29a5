"""The arithmetic of merges: arcs, elections and exact thresholds, on arrays alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import bits
from surgery.edits.interface import Array

Vectors = NDArray[np.float64]

COLINEAR = 0.9995
"""Cosine past which the arc between two tensors is taken for a line, as mergekit takes it."""

_LEAST_NORM = 1e-8
_DIGIT = 16
_LOW = np.uint32((1 << _DIGIT) - 1)


def arc(sums: Vectors, t: float) -> tuple[float, float]:
    """What vectors a and b are multiplied by at `t` of the arc from a to b; `sums` a·b, a·a, b·b.

    Colinear ones take the straight line; one of norm 0 is at right angles to anything.
    """
    cosine = sums[0] / np.prod(np.maximum(np.sqrt(sums[1:]), _LEAST_NORM))
    if abs(cosine) > COLINEAR:
        return 1 - t, t
    angle = np.arccos(cosine)
    return float(np.sin((1 - t) * angle) / np.sin(angle)), float(np.sin(t * angle) / np.sin(angle))


def weighted(changes: Sequence[Vectors], weights: Sequence[float]) -> Vectors:
    """Σ w_i·δ_i."""
    return np.asarray(np.tensordot(weights, np.stack(changes), axes=1), np.float64)


def elected(changes: Sequence[Vectors], weights: Sequence[float], normalize: bool) -> Vectors:
    """The sum of TIES: per element, of those w_i·δ_i whose sign is that of Σ w_i·δ_i.

    In float64; with `normalize`, divided by the sum of the weights that took part.
    """
    column = np.reshape(weights, (-1, *[1] * changes[0].ndim))
    products = column * np.stack(changes)
    sign = np.where(products.sum(axis=0) >= 0, 1.0, -1.0)
    taking_part = np.sign(products) == sign
    total = np.where(taking_part, products, 0).sum(axis=0)
    shares = np.where(taking_part, column, 0).sum(axis=0)
    divisor = np.where(shares == 0, 1, shares) if normalize else 1
    return np.asarray(total / divisor, np.float64)


def least_kept(magnitudes: Callable[[], Iterator[Array]], density: float) -> float:
    """The least of the `density` largest of all the numbers that `magnitudes()` yields.

    They are float32 and none is negative: such floats are ordered as their bits are, so that two
    reads find it exactly, 16 bits each, with 64 Ki counters. At least one number is kept.
    """
    high = _histogram(keys >> _DIGIT for keys in _keys(magnitudes))
    upper, left = _find(high, max(1, int(density * high.sum())))
    low = _histogram(keys[keys >> _DIGIT == upper] & _LOW for keys in _keys(magnitudes))
    lower, _ = _find(low, left)
    return float(np.array([upper << _DIGIT | lower], np.uint32).view(np.float32)[0])


def _keys(magnitudes: Callable[[], Iterator[Array]]) -> Iterator[NDArray[Any]]:
    return (bits(np.ascontiguousarray(numbers)).ravel() for numbers in magnitudes())


def _histogram(digits: Iterator[NDArray[Any]]) -> NDArray[np.int64]:
    counts = np.zeros(1 << _DIGIT, np.int64)
    for some in digits:
        counts += np.bincount(some, minlength=1 << _DIGIT)
    return counts


def _find(counts: NDArray[np.int64], k: int) -> tuple[int, int]:
    """The digit the `k`-th largest has, and which of those of that digit it is."""
    at_least = counts[::-1].cumsum()[::-1]
    digit = int(np.flatnonzero(at_least >= k)[-1])
    return digit, k - int(at_least[digit] - counts[digit])
