"""Greedy responses of the corners: as text, and where those of a pair part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from surgery.differential.behaviour import BehaviourSums
from surgery.differential.workload import Workload
from surgery.evidence import PAIRS, Parting
from surgery.metrics.flips import reach
from surgery.metrics.parting import parting
from surgery.runtimes.child import Outcome
from surgery.runtimes.generate import RunnerUp


@dataclass(frozen=True)
class Response:
    """New tokens, and the runner-up of each."""

    tokens: tuple[int, ...]
    runners: tuple[RunnerUp, ...]


@dataclass(frozen=True)
class Partings:
    """Of each response of a pair on one stimulus set: where it parts, and whether at a near-tie."""

    stimulus_set: str
    pair: str
    positions: tuple[int | None, ...]
    near: tuple[bool, ...]

    @property
    def parted(self) -> list[int]:
        return [position for position in self.positions if position is not None]

    def row(self) -> Parting:
        return Parting(
            self.stimulus_set,
            self.pair,
            len(self.positions),
            len(self.parted),
            sum(self.near),
            min(self.parted, default=None),
            float(np.median(self.parted)) if self.parted else None,
        )


def texts_of(outcome: Outcome, workload: Workload) -> dict[str, str]:
    """The text of every response, by stimulus."""
    if workload.tokenizer is None:
        return {}
    found = responses_of(outcome, workload)
    return {name: workload.tokenizer.decode(own.tokens) for name, own in found.items()}


def responses_of(outcome: Outcome, workload: Workload) -> dict[str, Response]:
    """Every response, by stimulus."""
    return {
        stimulus: Response(tokens, runners)
        for ids, made in zip(workload.responders, outcome.generations(), strict=True)
        for stimulus, tokens, runners in zip(ids, made.tokens, made.runners, strict=True)
    }


def partings(
    responses: Mapping[str, Mapping[str, Response]], workload: Workload, sums: BehaviourSums
) -> Iterator[Partings]:
    """One for each pair on each set that has responses; `responses` holds those of each corner."""
    for pair, (one, other) in PAIRS.items():
        if not (one in responses and other in responses):
            continue
        for name in dict.fromkeys(stimulus.set for stimulus in workload.stimuli):
            ids = [s.id for s in workload.of_set(name) if s.id in responses[one]]
            if ids:
                both = [(responses[one][i], responses[other][i]) for i in ids]
                positions = tuple(parting(a.tokens, b.tokens) for a, b in both)
                reaches = (_Reach(sums, name, one), _Reach(sums, name, other))
                near = tuple(map(_near, both, positions, [reaches] * len(both)))
                yield Partings(name, pair, positions, near)


@dataclass(frozen=True)
class _Reach:
    """The gap between two choices that rounding can turn, at one corner on one stimulus set.

    The float32 noise is the median over the set's kept positions: a response's own positions have
    no float64 reference.
    """

    sums: BehaviourSums
    stimulus_set: str
    corner: str

    def holds(self, runner: RunnerUp) -> bool:
        noises = self.sums.noise.get((self.stimulus_set, f"T_{self.corner[-1]}"))
        noise = float(np.median(np.concatenate(noises))) if noises else 0.0
        dtype = self.sums.dtypes.get(self.corner, "float32")
        return bool(runner.gap <= reach(np.array([runner.size]), dtype, noise)[0])


def _near(
    both: tuple[Response, Response], position: int | None, reaches: tuple[_Reach, _Reach]
) -> bool:
    """Whether each run's choice is the other's runner-up, within rounding of its first."""
    if position is None or any(position >= len(own.tokens) for own in both):
        return False
    chosen = [own.tokens[position] for own in both]
    runners = [own.runners[position] for own in both]
    crossed = [runner.token for runner in runners] == chosen[::-1]
    return crossed and all(map(_Reach.holds, reaches, runners))
