"""What a recipe does at several strengths, or with its first so many addresses: effect and cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.edits import Fields
from surgery.errors import FindError
from surgery.find.interface import Lab, Proposal
from surgery.find.recipes import recipe_text
from surgery.find.result import Change
from surgery.find.trials import Trials
from surgery.plan import Plan, make_plan
from surgery.recipe import Recipe, parse_recipe

NEUTRAL = {"factor": 1.0, "strength": 0.0, "scale": 0.0}
"""Fields that say how much of an edit there is, and where there is nothing of it."""

LISTS = ("heads", "neurons", "features", "components", "layers")
"""Fields that list what is edited, in a recipe that was found the best first."""

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Of a recipe as it is 1, of none 0."""


@dataclass(frozen=True)
class Setting:
    """How much of a recipe: its strength, and the number of addresses of each edit (None: all)."""

    strength: float = 1.0
    top: int | None = None


@dataclass(frozen=True)
class Point:
    """One setting: `effect` is the change of the goal on the target set, `costs` those of other
    metrics on the preserve set, KL(original || edited) first."""

    setting: Setting
    effect: Change
    costs: tuple[Change, ...]


@dataclass(frozen=True)
class Sweep:
    """Points in the order they were asked for; the goal is to be raised where `sign` is 1."""

    sign: int
    points: tuple[Point, ...]

    @cached_property
    def front(self) -> tuple[int, ...]:
        """The indices of the points that none betters in effect and cost both, by rising cost."""
        order = sorted(range(len(self.points)), key=lambda i: (self.cost(i), -self.worth(i)))
        found: list[int] = []
        for index in order:
            if self.worth(index) > (self.worth(found[-1]) if found else 0.0):
                found.append(index)
        return tuple(found)

    @cached_property
    def knee(self) -> int | None:
        """The point of the front that is furthest above the line from no edit at all to the front's
        last, both axes scaled to 1 (Satopää et al. 2011, "Finding a 'Kneedle' in a Haystack");
        None where no point moves the goal as wanted."""
        if not self.front:
            return None
        worth = np.array([self.worth(index) for index in self.front])
        cost = np.array([self.cost(index) for index in self.front])
        return self.front[int(np.argmax(_share(worth) - _share(cost)))]

    def worth(self, index: int) -> float:
        """How far the goal moves as wanted; of a model without finite logits -inf."""
        worth = self.sign * self.points[index].effect.change
        return -math.inf if math.isnan(worth) else worth

    def cost(self, index: int) -> float:
        """KL(original || edited) on the preserve set, nats per token."""
        cost = self.points[index].costs[0].change
        return math.inf if math.isnan(cost) else cost

    def to_json(self) -> dict[str, Any]:
        """Everything; the same for the same model, recipe and prompts."""
        return {
            "kind": "sweep-strength",
            "goal": {
                "metric": self.points[0].effect.metric,
                "direction": "raise" if self.sign > 0 else "lower",
            },
            "points": [asdict(point) for point in self.points],
            "front": list(self.front),
            "knee": self.knee,
        }


def _share(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the last one, which is the largest."""
    return values / values[-1] if values[-1] else np.zeros_like(values)


@dataclass(frozen=True)
class Sweeper:
    """Measures a recipe at settings: `target` the goal's trials, `preserve` those of the costs."""

    lab: Lab
    recipe: Recipe
    target: Trials
    preserve: Trials

    def run(self, settings: Sequence[Setting]) -> Sweep:
        """Raises `FindError` where the recipe has an edit without an amount or addresses."""
        points = []
        for done, setting in enumerate(settings):
            self.lab.progress("settings", done, len(settings))
            plan = self._plan(setting)
            (effect,) = self.target.changes(plan)
            points.append(Point(setting, effect, self.preserve.changes(plan)))
        return Sweep(self.lab.goal.sign, tuple(points))

    def _plan(self, setting: Setting) -> Plan:
        own = self.recipe
        text = setting_text(own, setting)
        changed = parse_recipe(text, own.source, own.folder, allow_outside=own.allow_outside)
        return make_plan(changed, self.lab.checkpoint)


def setting_text(recipe: Recipe, setting: Setting, heading: Sequence[str] = ()) -> str:
    """The recipe at a setting, to lie where the recipe lies."""
    entries = tuple(
        {"op": edit.model_dump()["op"], **dict(_fields(recipe, number, edit, setting))}
        for number, edit in enumerate(recipe.edits)
    )
    proposal = Proposal(entries, untie=recipe.untie, allow_overlap=recipe.allow_overlap)
    return recipe_text(proposal, None, heading)


def _fields(
    recipe: Recipe, number: int, edit: Fields, setting: Setting
) -> Iterator[tuple[str, Any]]:
    """The fields that were given, and those that the setting changes."""
    whole = edit.model_dump(by_alias=True)
    given = edit.model_dump(by_alias=True, exclude_unset=True)
    place = f"{recipe.source}: edits[{number}] ({whole['op']})"
    amount = next((name for name in NEUTRAL if whole.get(name) is not None), None)
    if amount is None and setting.strength != 1:
        raise FindError(f"{place}: has no factor, strength or scale; sweep --top instead")
    listed = next((name for name in LISTS if isinstance(whole.get(name), list)), None)
    if listed is None and setting.top is not None and whole.get("top") is None:
        raise FindError(f"{place}: lists no addresses to take the first of; sweep --strength")
    for name, value in given.items():
        if name != "op" and name != amount:
            yield name, _first(name, value, listed, setting.top)
    if amount is not None:
        neutral = NEUTRAL[amount]
        yield amount, neutral + setting.strength * (whole[amount] - neutral)


def _first(name: str, value: Any, listed: str | None, top: int | None) -> Any:
    if top is None:
        return value
    if name == listed:
        return value[:top]
    return min(value, top) if name == "top" else value
