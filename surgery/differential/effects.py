"""The behaviour metrics at every corner: of all texts, and of each for what its interval needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from surgery.differential.behaviour import BehaviourSums, Tokens
from surgery.differential.measures import Measure
from surgery.differential.workload import Workload
from surgery.evidence import EDITS, Effect, Interval
from surgery.metrics import Metric, Observed
from surgery.metrics.interface import POSITIONS
from surgery.metrics.intervals import Bounds, bootstrap_mean, exact_change, exact_difference
from surgery.stimuli import Stimulus

ROUNDING = 1e-9

Texts = Mapping[str, str]
"""Responses by stimulus."""

LogProbs = Mapping[str, Mapping[str, tuple[float, ...]]]
"""The log-probability of each token of an answer, by stimulus and the answer's text."""


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

    def logs(self) -> Scores:
        """The natural logarithms; of a text without weight 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            scores = np.where(self.weights > 0, np.log(self.scores), 0.0)
            return replace(self, total=float(np.log(self.total)), scores=scores)


@dataclass(frozen=True)
class Seen:
    """What one corner made of one stimulus set: its responses and answers, and of each kept
    position what is known of the next token and of the way the edit took."""

    responses: Texts = field(default_factory=dict)
    answers: LogProbs = field(default_factory=dict)
    token_nll: Tokens = field(default_factory=Tokens)
    kl: Tokens = field(default_factory=Tokens)

    def of(self, stimuli: Sequence[Stimulus]) -> Observed:
        """All of it, as a metric sees it."""
        return self._observed(stimuli, self.token_nll.all(), self.kl.all())

    def each(self, stimuli: Sequence[Stimulus]) -> Iterator[Observed]:
        """What belongs to each stimulus alone."""
        nll, kl = _by_text(self.token_nll), _by_text(self.kl)
        none = np.empty(0)
        for stimulus in stimuli:
            own = nll.get(stimulus.id, none), kl.get(stimulus.id, none)
            yield self._observed((stimulus,), *own)

    def _observed(
        self,
        stimuli: Sequence[Stimulus],
        nll: NDArray[np.float64],
        kl: NDArray[np.float64],
    ) -> Observed:
        written = tuple(self.responses.get(stimulus.id, "") for stimulus in stimuli)
        answers = tuple(self.answers.get(stimulus.id, {}) for stimulus in stimuli)
        return Observed(tuple(stimuli), written, nll, kl, answers)


@dataclass(frozen=True)
class Observation:
    """One metric on one stimulus set, at every corner that ran."""

    measure: Measure
    count: int
    corners: Mapping[str, Scores]

    def effect(self) -> Effect:
        totals = {name: own.total for name, own in self.corners.items()}
        measure, metric = self.measure, self.measure.metric
        place = (measure.name, measure.stimulus_set, self.count, totals, metric.unit)
        method = "; ".join(filter(None, (metric.method, metric.origin)))
        return Effect(*place, method, metric.relative)

    def intervals(self, confidence: float) -> Iterator[Interval]:
        """The interval of the change in each runtime, where there is one."""
        effect = self.effect()
        for runtime, pair in EDITS.items():
            if not set(pair) <= self.corners.keys():
                continue
            before, after = (self.corners[name] for name in pair)
            found = bounds(self.measure.metric, before, after, confidence)
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


def bounds(metric: Metric, before: Scores, after: Scores, confidence: float) -> Bounds | None:
    """Bounds of the change of a mean over texts; None of anything else, and of too few texts.

    Of a relative metric those of the ratio of two geometric means, less 1.
    """
    if metric.relative:
        found = _of_means(before.logs(), after.logs(), confidence)
        return (float(np.expm1(found[0])), float(np.expm1(found[1]))) if found else None
    # A number of positions may be 0 or 1 at all of them, and is still no yes or no about a text.
    if metric.needs in POSITIONS or not (before.is_share and after.is_share):
        return _of_means(before, after, confidence)
    return _of_shares(before, after, confidence)


def _of_means(before: Scores, after: Scores, confidence: float) -> Bounds | None:
    paired = bool(np.array_equal(before.weights, after.weights))
    if not (paired and before.is_mean and after.is_mean):
        return None
    gained = (after.scores - before.scores) * before.weights
    return bootstrap_mean(gained, before.weights, confidence)


def _of_shares(before: Scores, after: Scores, confidence: float) -> Bounds | None:
    if not (before.is_mean and after.is_mean):
        return None
    paired = bool(np.array_equal(before.weights, after.weights))
    if not (paired and before.weights.all()):
        return exact_difference(before.counted, after.counted, confidence)
    change = after.scores - before.scores
    up, down = int((change > 0).sum()), int((change < 0).sum())
    return exact_change(up, down, len(change), confidence)


def observe(
    texts: Mapping[str, Texts],
    workload: Workload,
    sums: BehaviourSums,
    answers: Mapping[str, LogProbs] = MappingProxyType({}),
) -> Iterator[Observation]:
    """Every measure of the workload; `texts` holds each corner's responses, `answers` the
    log-probabilities it gives to answers."""
    for measure in workload.measures:
        if not _is_measured(sums, measure):
            continue  # there is no such position: asked for, it is "not measured"
        stimuli = workload.of_set(measure.stimulus_set)
        count = sum(measure.metric.applies(stimulus) for stimulus in stimuli)
        corners = {
            name: score(measure.metric, stimuli, _seen(sums, measure, name, own, answers))
            for name, own in texts.items()
        }
        yield Observation(measure, count, corners)


def _is_measured(sums: BehaviourSums, measure: Measure) -> bool:
    """Whether there is a position of the set that tells anything, where the metric needs one."""
    if measure.metric.needs == "token_nll":
        own = [t for (name, _), t in sums.tokens.items() if name == measure.stimulus_set]
        return any(tokens.texts for tokens in own)
    if measure.metric.needs == "kl":
        return any((measure.stimulus_set, runtime) in sums.pairs for runtime in EDITS)
    return True


def _seen(
    sums: BehaviourSums,
    measure: Measure,
    corner: str,
    responses: Texts,
    answers: Mapping[str, LogProbs],
) -> Seen:
    place = (measure.stimulus_set, corner)
    nll = sums.tokens.get(place, Tokens())
    return Seen(responses, answers.get(corner, {}), nll, _kl(sums, *place))


def _kl(sums: BehaviourSums, stimulus_set: str, corner: str) -> Tokens:
    """KL of the original in the same runtime to the corner, which of the original itself is 0."""
    pair = sums.pairs.get((stimulus_set, corner[0]))
    if pair is None:
        return Tokens()
    edited = corner == EDITS[corner[0]][1]
    return Tokens(pair.kl if edited else [np.zeros_like(kl) for kl in pair.kl], pair.texts)


def score(metric: Metric, stimuli: tuple[Stimulus, ...], seen: Seen) -> Scores:
    """The metric of one corner on one stimulus set; its texts in the order of their names, as those
    of every other figure, so that intervals are drawn over the same ones."""
    own = [
        _score_one(metric, observed)
        for observed in seen.each(sorted(stimuli, key=lambda stimulus: stimulus.id))
        if metric.applies(observed.stimuli[0])
    ]
    scores, weights = np.array(own, np.float64).reshape(-1, 2).T
    return Scores(float(metric.score(seen.of(stimuli))), scores, weights)


def _score_one(metric: Metric, observed: Observed) -> tuple[float, float]:
    """Score and weight of one text; where there is nothing to score both are 0."""
    if metric.needs not in POSITIONS:
        found = metric.score(observed)
        return (0.0, 0.0) if np.isnan(found) else (found, 1.0)
    weight = len(observed.token_nll if metric.needs == "token_nll" else observed.kl)
    return (metric.score(observed), float(weight)) if weight else (0.0, 0.0)


def _by_text(tokens: Tokens) -> dict[str, NDArray[np.float64]]:
    """The values of each text, in order."""
    found: dict[str, list[float]] = {}
    for name, value in zip(tokens.texts, tokens.all().tolist(), strict=True):
        found.setdefault(name, []).append(value)
    return {name: np.array(values, np.float64) for name, values in found.items()}
