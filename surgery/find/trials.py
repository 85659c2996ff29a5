"""What edits of the live model do, measured as reports measure it, and kept in the journal."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from surgery.differential.effects import Scores, change_bounds
from surgery.find.behaviour import observe
from surgery.find.interface import Lab
from surgery.find.recipes import planted
from surgery.find.result import Change
from surgery.metrics import Metric, make_metric
from surgery.plan import Plan
from surgery.stimuli import Stimulus

CONFIDENCE = 0.95
PARTS = ("total", "scores", "weights")


@dataclass(frozen=True)
class Trials:
    """Measures edits on one set of prompts by some metrics, each named as in a policy."""

    lab: Lab
    stimuli: tuple[Stimulus, ...]
    names: tuple[str, ...]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(make_metric(name) for name in self.names)

    def scores(self, plan: Plan | None) -> dict[str, Scores]:
        """By metric, of the model as it is or with the plan's edits; a metric that says nothing
        about these prompts has a NaN for its total."""
        kept = self.lab.journal.arrays(
            self._name(plan),
            lambda: {
                f"{number}/{part}": np.asarray(getattr(scores, part))
                for number, scores in enumerate(self._measure(plan))
                for part in PARTS
            },
        )
        parts = [[kept[f"{number}/{part}"] for part in PARTS] for number in range(len(self.names))]
        return {
            name: Scores(float(total), scores, weights)
            for name, (total, scores, weights) in zip(self.names, parts, strict=True)
        }

    def changes(self, plan: Plan) -> tuple[Change, ...]:
        """Before and after, of each metric that says something about these prompts."""
        before, after = self.scores(None), self.scores(plan)
        found = (self._change(name, before[name], after[name]) for name in self.names)
        return tuple(change for change in found if not math.isnan(change.before))

    def _change(self, name: str, before: Scores, after: Scores) -> Change:
        metric = make_metric(name)
        count = sum(map(metric.applies, self.stimuli))
        low, high = change_bounds(before, after, CONFIDENCE) or (None, None)
        own = "+".join(sorted({stimulus.set for stimulus in self.stimuli}))
        return Change(name, own, metric.unit, count, before.total, after.total, low, high)

    def _measure(self, plan: Plan | None) -> list[Scores]:
        with planted(self.lab, plan) if plan else nullcontext():
            return observe(self.lab, self.stimuli, self.metrics)

    def _name(self, plan: Plan | None) -> str:
        """What the journal calls a measurement: prompts, metrics, and what the edits read."""
        ids = ",".join(stimulus.id for stimulus in self.stimuli)
        edits = (plan.recipe.sha256, sorted(plan.inputs.items())) if plan else ()
        return f"{ids} {self.names} {edits}"
