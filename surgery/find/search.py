"""From prompts to a recipe: rank, choose how many, and hold the effect against chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from surgery.errors import FindError
from surgery.find.interface import Finder, Goal, Lab, Proposal, Ranking
from surgery.find.recipes import Planner
from surgery.find.result import Change, Control, Found, Trial
from surgery.find.trials import Trials
from surgery.metrics import Metric, make_metric
from surgery.stimuli import Stimulus

DRAWS = 20
"""Random edits of equal size that an effect is held against."""

TARGET, PRESERVE = "target", "preserve"

COSTS = ("kl", "nll")
"""What is measured on the preserve set besides the goal."""


@dataclass(frozen=True)
class Prompts:
    """validation: chooses how many candidates, none where the user does; holdout: what the effect
    is measured on; preserve: what shall stay as it is."""

    validation: tuple[Stimulus, ...]
    holdout: tuple[Stimulus, ...]
    preserve: tuple[Stimulus, ...]


@dataclass(frozen=True)
class Search:
    """One finder at work on one model."""

    finder: Finder
    lab: Lab
    prompts: Prompts
    planner: Planner

    def run(self, top: int | None) -> Found:
        """Ranks by the lab's prompts, takes the best `top` candidates, or as many as serve the
        validation prompts best, and measures them and `DRAWS` random ones on the held-out prompts.

        Raises `FindError` where there is nothing to choose from, `InputError` where an edit cannot
        be made.
        """
        finder, lab = self.finder, self.lab
        ranking = finder.rank(lab)
        if not ranking.rows:
            raise FindError(f"{lab.checkpoint.root}: has no {finder.kind} to choose from")
        trials = () if top is not None else self._sizes(ranking)
        size = top if top is not None else _best(trials, lab.goal).size
        if size > len(ranking.rows):
            raise FindError(f"--top {size}: {len(ranking.rows)} {finder.kind} can be proposed")
        chosen = tuple(range(size))
        proposal = finder.propose(lab, ranking, chosen)
        held_out = Trials.of(lab, self.prompts.holdout, TARGET, {lab.goal.name: lab.goal.metric})
        return Found(
            finder.kind,
            finder.method,
            lab.goal.sign,
            lab.seed,
            ranking,
            chosen,
            proposal,
            trials,
            self._effect(held_out, proposal),
            self._control(ranking, chosen, held_out),
            self._costs(proposal),
        )

    def _sizes(self, ranking: Ranking) -> tuple[Trial, ...]:
        """The change of the goal with each number of candidates there can be."""
        goal = self.lab.goal
        sizes = [size for size in self.finder.sizes if size <= len(ranking.rows)]
        metrics = {goal.name: goal.metric, **_finer(goal)}
        trials = Trials.of(self.lab, self.prompts.validation, TARGET, metrics)
        found = []
        for done, size in enumerate(sizes):
            self.lab.progress("how many", done, len(sizes))
            plan = self.planner.plan(self.finder.propose(self.lab, ranking, range(size)))
            changes = {change.metric: change.change for change in trials.changes(plan)}
            finer = next((changes[name] for name in _finer(goal) if name in changes), None)
            found.append(Trial(size, changes.get(goal.name, math.nan), finer))
        return tuple(found)

    def _effect(self, held_out: Trials, proposal: Proposal) -> Change:
        (effect,) = held_out.changes(self.planner.plan(proposal))
        return effect

    def _control(self, ranking: Ranking, chosen: tuple[int, ...], held_out: Trials) -> Control:
        changes = []
        for draw in range(DRAWS):
            self.lab.progress("random edits", draw, DRAWS)
            generator = np.random.default_rng((self.lab.seed, draw))
            proposal = self.finder.draw(self.lab, ranking, chosen, generator)
            changes.append(self._effect(held_out, proposal).change)
        return Control(tuple(changes))

    def _costs(self, proposal: Proposal) -> tuple[Change, ...]:
        self.lab.progress("cost", 0, 1)
        metrics = cost_metrics(self.lab.goal)
        trials = Trials.of(self.lab, self.prompts.preserve, PRESERVE, metrics)
        return trials.changes(self.planner.plan(proposal))


def cost_metrics(goal: Goal) -> dict[str, Metric]:
    """What is measured on the preserve set: how far it moves, and the goal itself."""
    return {**{name: make_metric(name) for name in COSTS}, goal.name: goal.metric}


def _finer(goal: Goal) -> dict[str, Metric]:
    """What decides between equal rates: the answer's own log-probability."""
    name = f"answer_logprob:{goal.argument}"
    return {name: make_metric(name)} if goal.name.startswith("answer_rate:") else {}


def _best(trials: Sequence[Trial], goal: Goal) -> Trial:
    """By the goal, then by the answer's probability, then the fewest (PH3, arXiv 2402.18154)."""

    def worth(trial: Trial) -> tuple[float, float, int]:
        change = -math.inf if math.isnan(trial.change) else goal.sign * trial.change
        return change, goal.sign * (trial.logprob or 0.0), -trial.size

    return max(trials, key=worth)
