"""Confidence intervals: exact for shares, a seeded bootstrap over texts for means.

Positions of one text are not independent of each other; texts are. So what is drawn again is
whole texts, and a mean over positions is a ratio of two sums over texts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtr, stdtrit

Values = NDArray[np.float64]
Bounds = tuple[float, float]

LEVELS = (0.95, 0.99)
"""Confidences for which every run has intervals."""

SEED = 0
RESAMPLES = 10_000
FEWEST_RESAMPLES = 2_000
DRAWS = 1 << 23
"""Texts drawn in all, which bounds the work where there are many: the more texts, the fewer
resamples are needed."""

FEWEST_QUANTILES = 200

AT_ONCE = 1 << 20
"""Texts drawn at a time, which bounds the memory."""

LEAST_TEXTS = 8
"""Fewer texts say nothing of their own spread: there is no interval then."""

NOTHING: Bounds = (0.0, 1.0)


def exact_rate(hits: int, count: int, confidence: float) -> Bounds:
    """Clopper and Pearson (1934): every share under which `hits` of `count` are not too rare.

    Holds the true share with at least `confidence`, however few there are; (0, 1) of none.
    """
    if count == 0:
        return NOTHING
    tail = (1 - confidence) / 2
    low = float(betaincinv(hits, count - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, count - hits, 1 - tail)) if hits < count else 1.0
    return low, high


def exact_change(gained: int, lost: int, count: int, confidence: float) -> Bounds:
    """Bounds of (gained − lost) / count, for a yes or no about each of `count` texts before and
    after: those that became yes, and those that became no.

    The exact bounds of both shares, each at half the doubt (Bonferroni), so together they hold
    with at least `confidence`.
    """
    each = (1 + confidence) / 2
    up, down = exact_rate(gained, count, each), exact_rate(lost, count, each)
    return up[0] - down[1], up[1] - down[0]


def exact_difference(before: tuple[int, int], after: tuple[int, int], confidence: float) -> Bounds:
    """Bounds of a difference of two shares, (hits, count) each, that are not of the same texts."""
    each = (1 + confidence) / 2
    first, second = exact_rate(*before, each), exact_rate(*after, each)
    return second[0] - first[1], second[1] - first[0]


def resampled(sums: Values, weights: Values) -> Values:
    """Σ `sums` / Σ `weights` of texts drawn again with replacement; both [texts], weights > 0.

    The draws follow from the number of texts alone, so figures of the same texts are paired.
    """
    texts = len(sums)
    count = min(RESAMPLES, max(FEWEST_RESAMPLES, DRAWS // texts))
    generator = np.random.default_rng((SEED, texts))
    found: list[Values] = []
    for size in _chunks(count, max(1, AT_ONCE // texts)):
        drawn = generator.integers(texts, size=(size, texts))
        found.append(sums[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
    return np.concatenate(found)


def bootstrap_quantile(
    values: Values, text: NDArray[np.int64], share: float, confidence: float
) -> Bounds | None:
    """The interval of the `share` quantile of `values` [n] over texts, of which `text` [n] are the
    numbers from 0; None of fewer than `LEAST_TEXTS`.

    As `bootstrap_mean`. A quantile is here the least value that `share` of the values drawn do not
    exceed. Of few values, those far out say little, whatever the interval.
    """
    texts = int(text.max()) + 1
    if texts < LEAST_TEXTS:
        return None
    order = np.argsort(values, kind="stable")
    ordered, owner = values[order], text[order]
    generator = np.random.default_rng((SEED, texts))
    count = min(FEWEST_RESAMPLES, max(FEWEST_QUANTILES, DRAWS // len(values)))
    found: list[Values] = []
    for size in _chunks(count, max(1, AT_ONCE // len(values))):
        times = generator.multinomial(texts, np.full(texts, 1 / texts), size=size)
        reached = np.cumsum(times[:, owner], axis=1)
        found.append(ordered[(reached >= share * reached[:, -1:]).argmax(axis=1)])
    estimate = float(np.quantile(values, share))
    low, high = np.quantile(np.concatenate(found), _tails(texts, confidence)).tolist()
    return min(low, estimate), max(high, estimate)


def _chunks(count: int, size: int) -> list[int]:
    return [min(size, count - begin) for begin in range(0, count, size)]


def bootstrap_mean(sums: Values, weights: Values, confidence: float) -> Bounds | None:
    """The interval of Σ `sums` / Σ `weights` over texts [n]; None of fewer than `LEAST_TEXTS`.

    The expanded percentile interval (Hesterberg 2015, arXiv 1411.5279): plain
    percentiles are too narrow for few texts, by √((n−1)/n) and by z in place of t. It is widened
    where it must be to hold the estimate.
    """
    held = weights > 0
    sums, weights = sums[held], weights[held]
    if len(sums) < LEAST_TEXTS:
        return None
    estimate = float(sums.sum() / weights.sum())
    low, high = np.quantile(resampled(sums, weights), _tails(len(sums), confidence)).tolist()
    return min(low, estimate), max(high, estimate)


def _tails(texts: int, confidence: float) -> Bounds:
    z = np.sqrt(texts / (texts - 1)) * stdtrit(texts - 1, (1 + confidence) / 2)
    tail = float(ndtr(-z))
    return tail, 1 - tail


def wider(one: Bounds, other: Bounds | None) -> Bounds:
    """The bounds that hold both; NaN stays NaN."""
    if other is None:
        return one
    return float(np.min([one[0], other[0]])), float(np.max([one[1], other[1]]))
