"""What a search found, and what says that it is no chance: types and their JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from surgery.find.interface import Proposal, Ranking

QUANTILE = 0.95
"""Of the random draws, what an effect must be above."""


@dataclass(frozen=True)
class Change:
    """A metric on one stimulus set of the model before and after an edit.

    `count`: the texts it says something about; `low` and `high`: the 95 % interval of `change`, NaN
    where there is none, as of fewer than 8 texts. All are NaN where the edit leaves no finite
    logits.
    """

    metric: str
    stimulus_set: str
    unit: str
    count: float
    before: float
    after: float
    change: float
    low: float
    high: float


@dataclass(frozen=True)
class Control:
    """The same metric's change under random edits of equal size, one for each draw."""

    changes: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.changes))

    def bound(self, sign: int) -> float:
        """The change that 95 % of the draws do not go beyond, in the direction of `sign`."""
        return sign * float(np.quantile(sign * np.array(self.changes), QUANTILE))


@dataclass(frozen=True)
class Trial:
    """The change of the goal on the validation prompts with the best `size` candidates."""

    size: int
    change: float
    logprob: float | None


@dataclass(frozen=True)
class Found:
    """The outcome of one search.

    `chosen` are indices of the ranking; `effect` is held out, `control` on the same prompts;
    `costs` are changes on the preserve set; `sign` is 1 where the goal is to be raised.
    """

    kind: str
    method: str
    sign: int
    seed: int
    ranking: Ranking
    chosen: tuple[int, ...]
    proposal: Proposal
    trials: tuple[Trial, ...]
    effect: Change
    control: Control
    costs: tuple[Change, ...]

    @property
    def direction(self) -> str:
        return "raise" if self.sign > 0 else "lower"

    @property
    def why_not(self) -> str:
        """Why the effect is no better than chance; empty where it is better."""
        effect, bound = self.effect, self.control.bound(self.sign)
        change = self.sign * effect.change
        if math.isnan(change) or math.isnan(bound):
            return "nothing was measured on the held-out prompts"
        if not change > 0:
            return f"{effect.metric} does not move as wanted"
        if not change > self.sign * bound:
            return (
                f"95 % of random draws stay within {bound:+.3g}, and this is {effect.change:+.3g}"
            )
        if math.isnan(effect.low):
            return (
                f"{effect.count:.0f} held-out prompts are too few for an interval; give 8 or more"
            )
        if not (effect.low if self.sign > 0 else -effect.high) > 0:
            return f"the 95 % interval {effect.low:+.3g} … {effect.high:+.3g} holds no change"
        return ""

    @property
    def above_chance(self) -> bool:
        return not self.why_not

    def to_json(self) -> dict[str, Any]:
        """Everything but the arrays; deterministic for the same model, prompts and seed."""
        columns = self.ranking.columns
        return {
            "kind": self.kind,
            "method": self.method,
            "goal": {
                "metric": self.effect.metric,
                "direction": "raise" if self.sign > 0 else "lower",
            },
            "seed": self.seed,
            "above_chance": self.above_chance,
            "why_not": self.why_not,
            "chosen": [dict(zip(columns, self.ranking.rows[i], strict=True)) for i in self.chosen],
            "candidates": len(self.ranking.rows),
            "sizes": [asdict(trial) for trial in self.trials],
            "held_out": asdict(self.effect),
            "random": {
                "draws": len(self.control.changes),
                "changes": list(self.control.changes),
                "mean": self.control.mean,
                "bound_95": self.control.bound(self.sign),
            },
            "preserve": [asdict(cost) for cost in self.costs],
            "facts": dict(self.ranking.facts),
        }
