"""Intervals of what the corners' behaviour was measured to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.differential.behaviour import BehaviourSums, Positions
from surgery.differential.effects import Observation
from surgery.differential.responses import Partings
from surgery.evidence import Interval
from surgery.metrics.intervals import (
    Bounds,
    bootstrap_mean,
    bootstrap_quantile,
    exact_rate,
    wider,
)

QUANTILES = {"kl_median": 0.5, "kl_99%": 0.99}


def intervals(
    sums: BehaviourSums,
    responses: Sequence[Partings],
    effects: Sequence[Observation],
    confidences: Sequence[float],
) -> Iterator[Interval]:
    """Every interval there is, at each of `confidences`."""
    for confidence in confidences:
        for (stimulus_set, pair), own in sums.pairs.items():
            yield from _of_positions(sums, stimulus_set, pair, own, confidence)
        for parted in responses:
            hits, count = len(parted.parted), len(parted.positions)
            place = ("parted_rate", parted.stimulus_set, parted.pair, count, confidence)
            yield Interval(*place, hits / count, *exact_rate(hits, count, confidence))
        for effect in effects:
            # That of `kl` is there: the change of a metric that is 0 at the original is its value.
            if effect.measure.name != "kl":
                yield from effect.intervals(confidence)


def _of_positions(
    sums: BehaviourSums, stimulus_set: str, pair: str, own: Positions, confidence: float
) -> Iterator[Interval]:
    flipped, near = np.concatenate(own.flipped), np.concatenate(own.near)
    for name, flags in (("flip_rate", flipped), ("real_flip_rate", flipped & ~near)):
        place = (name, stimulus_set, pair, own.count, confidence)
        low, high = _rate(flags, own.texts, confidence)
        yield Interval(*place, float(flags.mean()), low, high)
    yield from _mean("kl", stimulus_set, pair, np.concatenate(own.kl), own.texts, confidence)
    yield from _quantiles(stimulus_set, pair, own, confidence)
    before, after = sums.token_pair(stimulus_set, pair)
    if len(before):
        texts = sums.texts(stimulus_set, pair)
        yield from _mean("log_ratio", stimulus_set, pair, after - before, texts, confidence)


def _quantiles(
    stimulus_set: str, pair: str, own: Positions, confidence: float
) -> Iterator[Interval]:
    kl = np.concatenate(own.kl)
    names, text = np.unique(own.texts, return_inverse=True)
    for name, share in QUANTILES.items():
        if bounds := bootstrap_quantile(kl, text, share, confidence):
            place = (name, stimulus_set, pair, len(names), confidence)
            yield Interval(*place, float(np.quantile(kl, share)), *bounds)


def _rate(flags: NDArray[np.bool_], texts: list[str], confidence: float) -> Bounds:
    """Exact as if positions were independent, and never narrower than texts say they are."""
    exact = exact_rate(int(flags.sum()), len(flags), confidence)
    return wider(exact, bootstrap_mean(*_over_texts(flags, texts), confidence))


def _mean(
    name: str,
    stimulus_set: str,
    pair: str,
    values: NDArray[np.float64],
    texts: list[str],
    confidence: float,
) -> Iterator[Interval]:
    totals, weights = _over_texts(values, texts)
    if bounds := bootstrap_mean(totals, weights, confidence):
        place = (name, stimulus_set, pair, len(totals), confidence)
        estimate = float(values.mean())
        yield Interval(*place, estimate, min(bounds[0], estimate), max(bounds[1], estimate))


def _over_texts(values: NDArray[Any], texts: list[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The sum over each text, and how many values it has; in order of the texts' names."""
    _, number, counts = np.unique(texts, return_inverse=True, return_counts=True)
    return np.bincount(number, weights=values), counts.astype(np.float64)
