"""What edits of the live model do, measured as reports measure it, and kept in the journal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from surgery.differential.effects import Observation
from surgery.differential.measures import Measure
from surgery.differential.workload import Workload, end_tokens
from surgery.errors import FindError
from surgery.evidence import EDITS
from surgery.find.behaviour import Behaviour, ask, changes, observe
from surgery.find.interface import Lab
from surgery.find.recipes import planted
from surgery.find.result import Change
from surgery.metrics import Metric
from surgery.plan import Plan
from surgery.stimuli import Stimulus

Metrics = Mapping[str, Metric]
"""By the name a policy gives each."""

CONFIDENCE = 0.95
NUMBERS = ("count", "before", "after", "change", "low", "high")
"""Fields of a `Change`, as the journal keeps them."""


@dataclass(frozen=True)
class Trials:
    """Measures edits on prompts by metrics, each of which says something about one of them."""

    lab: Lab
    stimuli: tuple[Stimulus, ...]
    measures: tuple[Measure, ...]

    @classmethod
    def of(
        cls, lab: Lab, stimuli: tuple[Stimulus, ...], stimulus_set: str, metrics: Metrics
    ) -> Trials:
        """Trials on one set of the prompts, by those metrics that say something about them."""
        own = tuple(stimulus for stimulus in stimuli if stimulus.set == stimulus_set)
        measures = (Measure(name, stimulus_set, metric) for name, metric in metrics.items())
        return cls(lab, own, tuple(m for m in measures if any(map(m.metric.applies, own))))

    def changes(self, plan: Plan) -> tuple[Change, ...]:
        """Of each of `measures`, before and after; NaN where the edit leaves no finite logits."""
        kept = self.lab.journal.array(self._name(plan), lambda: self._numbers(plan))
        return tuple(
            Change(
                own.name, own.stimulus_set, own.metric.unit, **dict(zip(NUMBERS, row, strict=True))
            )
            for own, row in zip(self.measures, kept.tolist(), strict=True)
        )

    def _numbers(self, plan: Plan) -> NDArray[np.float64]:
        before = self._before
        try:
            with planted(self.lab, plan):
                after = observe(self.lab.runtime, self._workload, before)
        except FindError:
            return np.full((len(self.measures), len(NUMBERS)), math.nan)
        return np.array([_row(own) for own in changes(before, after)], np.float64)

    @cached_property
    def _before(self) -> Behaviour:
        return observe(self.lab.runtime, self._workload)

    @cached_property
    def _workload(self) -> Workload:
        lab = self.lab
        return ask(
            lab.tokenizer,
            self.stimuli,
            self.measures,
            vocab=lab.arch.sizes["vocab"],
            positions=lab.arch.sizes["positions"],
            eos=end_tokens(lab.checkpoint),
        )

    def _name(self, plan: Plan) -> str:
        """What the journal calls a measurement: prompts, metrics, and what the edits read."""
        ids = ",".join(stimulus.id for stimulus in self.stimuli)
        names = [measure.name for measure in self.measures]
        return f"{ids} {names} {plan.recipe.sha256} {sorted(plan.inputs.items())}"


def _row(own: Observation) -> tuple[float, ...]:
    """`NUMBERS` of an observation; NaN for an interval there is none of."""
    effect = own.effect()
    before, after = (effect.corners[name] for name in EDITS["T"])
    interval = next((i for i in own.intervals(CONFIDENCE) if i.pair == "T"), None)
    low, high = (interval.low, interval.high) if interval else (math.nan, math.nan)
    return own.count, before, after, effect.change("T"), low, high
