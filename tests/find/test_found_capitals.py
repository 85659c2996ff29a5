"""On the capitals fixture a feature and a direction do more than 20 random ones do, on prompts that
nothing was chosen by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from finding import lab_of, planted, rate

from surgery.find.direction import Direction
from surgery.find.features import Features
from surgery.find.interface import Finder, Lab, Ranking
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import load_stimuli

CAPITALS = Path(__file__).resolve().parents[2] / "fixtures" / "capitals-gpt2"
SAE_Z = CAPITALS / "sae-z"
REMEMBERED = "answer_rate:remembered"
DRAWS = 20


def read(name: str) -> tuple[Stimulus, ...]:
    return load_stimuli([CAPITALS / "stimuli" / f"{name}.jsonl"])


@dataclass
class Trial:
    """What a finder chose by the training prompts, and the held-out ones it is judged on."""

    finder: Finder
    lab: Lab
    ranking: Ranking
    chosen: list[int]
    target: tuple[Stimulus, ...]
    preserve: tuple[Stimulus, ...]
    folder: Path

    def change(self, stimuli: tuple[Stimulus, ...], goal: str, seed: int | None = None) -> float:
        """By how much the proposal, or the draw of a seed, changes a metric."""
        before = rate(self.lab, goal, stimuli)
        if seed is None:
            proposal = self.finder.propose(self.lab, self.ranking, self.chosen)
        else:
            generator = np.random.default_rng(seed)
            proposal = self.finder.draw(self.lab, self.ranking, self.chosen, generator)
        with planted(self.lab, proposal, self.folder / f"recipe-{seed}"):
            return rate(self.lab, goal, stimuli) - before


def trial(
    finder: Finder, prompts: str, goal: str, sign: int, size: int, folder: Path, every: int = 1
) -> Trial:
    lab = lab_of(CAPITALS, read(f"{prompts}-train"), folder / "journal", goal, sign, budget=64)
    held = read(f"{prompts}-holdout")
    target, preserve = (
        tuple(one for one in held if one.set == name)[::every] for name in ("target", "preserve")
    )
    return Trial(finder, lab, finder.rank(lab), list(range(size)), target, preserve, folder)


def test_a_fact_is_forgotten_by_the_feature_that_holds_it(tmp_path: Path) -> None:
    """Feature 253, which the fixture's own recipe removes, is found by every method."""
    for method in Features.methods:
        finder = Features(sae=CAPITALS / "sae-resid", method=method)
        found = trial(finder, "forget", REMEMBERED, -1, 1, tmp_path / method, every=2)
        assert found.ranking.rows[0][0] == 253
    assert found.change(found.target, REMEMBERED) == -1
    assert found.change(found.preserve, REMEMBERED) > -0.15


def test_a_fact_is_forgotten_by_a_direction(tmp_path: Path) -> None:
    found = trial(Direction(method="ablation"), "forget", REMEMBERED, -1, 1, tmp_path, every=2)
    assert found.change(found.target, REMEMBERED) == -1
    assert found.change(found.preserve, REMEMBERED) > -0.25


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("finder", "prompts", "goal", "sign", "size"),
    [
        (Direction(), "forget", REMEMBERED, -1, 1),
        (Features(sae=CAPITALS / "sae-resid"), "forget", REMEMBERED, -1, 1),
        (Features(sae=SAE_Z, method="attribution"), "conflict", REMEMBERED, 1, 11),
        (
            Features(sae=SAE_Z, method="direct"),
            "conflict",
            "answer_rate:stated",
            -1,
            11,
        ),
    ],
)
def test_what_is_found_does_more_than_chance(
    finder: Finder, prompts: str, goal: str, sign: int, size: int, tmp_path: Path
) -> None:
    """Above the 95th percentile of the draws; by chance alone that is one time in 20."""
    every = 2 if prompts == "conflict" else 1
    found = trial(finder, prompts, goal, sign, size, tmp_path, every)
    random = [sign * found.change(found.target, goal, seed) for seed in range(DRAWS)]
    assert sign * found.change(found.target, goal) > np.quantile(random, 0.95)
    assert found.change(found.preserve, REMEMBERED) > -0.15
