"""The behaviour metrics at every corner: of all texts, and of each for what its interval needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgery.differential.behaviour import BehaviourSums, Tokens
from surgery.differential.workload import Measure, Workload
from surgery.evidence import EDITS, Effect, Interval
from surgery.metrics import Observed
from surgery.metrics.intervals import Bounds, bootstrap_mean, exact_change, exact_difference
from surgery.stimuli import Stimulus

ROUNDING = 1e-9


@dataclass(frozen=True)
class Scores:
    """One corner: the metric's `total`, and of each text its score and weight, [texts]."""

    total: float
    scores: NDArray[np.float64]
    weights: NDArray[np.float64]

    @property
    def is_mean(self) -> bool:
        """Whether the total is the weighted mean of the texts, without which a metric has no
        interval."""
        weight = self.weights.sum()
        own = float((self.scores * self.weights).sum() / weight) if weight else float("nan")
        return abs(own - self.total) <= ROUNDING * max(1.0, abs(self.total))

    @property
    def is_share(self) -> bool:
        return bool(np.isin(self.scores, (0.0, 1.0)).all())

    @property
    def counted(self) -> tuple[int, int]:
        """How many texts are a yes, and how many were judged."""
        return int((self.scores * self.weights).sum()), int(self.weights.sum())


@dataclass(frozen=True)
class Observation:
    """One metric on one stimulus set, at every corner that ran."""

    measure: Measure
    count: int
    corners: Mapping[str, Scores]

    def effect(self) -> Effect:
        totals = {name: own.total for name, own in self.corners.items()}
        measure = self.measure
        unit = measure.metric.unit
        return Effect(measure.name, measure.stimulus_set, self.count, totals, unit)

    def intervals(self, confidence: float) -> Iterator[Interval]:
        """The interval of the change in each runtime, where there is one."""
        effect = self.effect()
        for runtime, pair in EDITS.items():
            if not set(pair) <= self.corners.keys():
                continue
            before, after = (self.corners[name] for name in pair)
            found = _bounds(before, after, confidence)
            if found:
                change = effect.change(runtime)
                low, high = min(found[0], change), max(found[1], change)
                yield Interval(
                    effect.metric,
                    effect.stimulus_set,
                    runtime,
                    self.count,
                    confidence,
                    change,
                    low,
                    high,
                )


def _bounds(before: Scores, after: Scores, confidence: float) -> Bounds | None:
    """Bounds of the change of a mean over texts; None of anything else, and of too few texts."""
    if not (before.is_mean and after.is_mean):
        return None
    paired = bool(np.array_equal(before.weights, after.weights))
    if not (before.is_share and after.is_share):
        gained = (after.scores - before.scores) * before.weights
        return bootstrap_mean(gained, before.weights, confidence) if paired else None
    if not (paired and before.weights.all()):
        return exact_difference(before.counted, after.counted, confidence)
    change = after.scores - before.scores
    up, down = int((change > 0).sum()), int((change < 0).sum())
    return exact_change(up, down, len(change), confidence)


def observe(
    texts: Mapping[str, Mapping[str, str]], workload: Workload, sums: BehaviourSums
) -> Iterator[Observation]:
    """Every measure of the workload; `texts` holds each corner's responses by stimulus."""
    for measure in workload.measures:
        if measure.metric.needs == "token_nll" and not _has_tokens(sums, measure.stimulus_set):
            continue  # no kept position has a next token: asked for, it is "not measured"
        stimuli = workload.of_set(measure.stimulus_set)
        count = sum(measure.metric.applies(stimulus) for stimulus in stimuli)
        corners = {
            name: _score(
                measure,
                stimuli,
                responses,
                sums.tokens.get((measure.stimulus_set, name), Tokens()),
            )
            for name, responses in texts.items()
        }
        yield Observation(measure, count, corners)


def _has_tokens(sums: BehaviourSums, stimulus_set: str) -> bool:
    """Whether any corner saw a next token in this set."""
    return any(own.texts for (name, _), own in sums.tokens.items() if name == stimulus_set)


def _score(
    measure: Measure,
    stimuli: tuple[Stimulus, ...],
    responses: Mapping[str, str],
    tokens: Tokens,
) -> Scores:
    written = tuple(responses.get(stimulus.id, "") for stimulus in stimuli)
    total = measure.metric.score(Observed(stimuli, written, tokens.all()))
    own = [
        _score_one(measure, stimulus, response, nll)
        for stimulus, response, nll in zip(stimuli, written, _by_text(tokens, stimuli), strict=True)
        if measure.metric.applies(stimulus)
    ]
    scores, weights = np.array(own, np.float64).reshape(-1, 2).T
    return Scores(total, scores, weights)


def _score_one(
    measure: Measure, stimulus: Stimulus, response: str, nll: NDArray[np.float64]
) -> tuple[float, float]:
    """Score and weight of one text; where there is nothing to score both are 0."""
    if measure.metric.needs == "token_nll" and not len(nll):
        return 0.0, 0.0
    score = measure.metric.score(Observed((stimulus,), (response,), nll))
    if measure.metric.needs == "token_nll":
        return score, float(len(nll))
    return (0.0, 0.0) if np.isnan(score) else (score, 1.0)


def _by_text(tokens: Tokens, stimuli: tuple[Stimulus, ...]) -> Iterator[NDArray[np.float64]]:
    """-log p of each stimulus's own tokens."""
    found: dict[str, list[float]] = {}
    for name, value in zip(tokens.texts, tokens.all().tolist(), strict=True):
        found.setdefault(name, []).append(value)
    for stimulus in stimuli:
        yield np.array(found.get(stimulus.id, ()), np.float64)
