"""What a recipe does at several strengths, or with its first so many addresses: effect and cost."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from surgery.edits import Fields
from surgery.errors import FindError
from surgery.find.interface import Goal, Lab
from surgery.find.result import Change
from surgery.find.trials import Trials
from surgery.plan import make_plan
from surgery.recipe import Recipe
from surgery.stimuli import Stimulus

AMOUNTS = ("factor", "strength", "scale")
"""Fields that say how much of an edit there is; a factor of 1 and a strength of 0 are none."""

LISTS = ("heads", "neurons", "features", "components", "layers")
"""Fields that list what is edited, in a recipe that was found the best first."""

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Point:
    """One setting: `strength` 1 is the recipe as it is, `top` the number of addresses of each edit;
    `effect` the change of the goal on the target set, `costs` of others on the preserve set."""

    strength: float
    top: int | None
    effect: Change
    costs: tuple[Change, ...]

    @property
    def cost(self) -> float:
        """KL(original || edited) of the preserve set, nats per token."""
        return next(cost.change for cost in self.costs if cost.metric == "kl")


@dataclass(frozen=True)
class Sweep:
    """Points in the order they were asked for; `front` are the indices of those that no other
    betters in effect and cost both, by rising cost, `knee` the index that is proposed."""

    sign: int
    points: tuple[Point, ...]

    @property
    def front(self) -> tuple[int, ...]:
        order = sorted(range(len(self.points)), key=lambda i: (self._cost(i), -self._worth(i)))
        found: list[int] = []
        for index in order:
            if not found or self._worth(index) > self._worth(found[-1]):
                found.append(index)
        return tuple(found)

    @property
    def knee(self) -> int:
        """The point of the front furthest above the line between its ends, both axes scaled to 1
        (Satopaa et al. 2011, "Finding a kneedle in a haystack"); of two points the stronger."""
        front = self.front
        worth = np.array([self._worth(index) for index in front])
        cost = np.array([self._cost(index) for index in front])
        if len(front) < 3:
            return front[-1]
        above = _unit(worth) - _unit(cost)
        return front[int(np.argmax(above))]

    def _worth(self, index: int) -> float:
        worth = self.sign * self.points[index].effect.change
        return -math.inf if math.isnan(worth) else worth

    def _cost(self, index: int) -> float:
        cost = self.points[index].cost
        return math.inf if math.isnan(cost) else cost
