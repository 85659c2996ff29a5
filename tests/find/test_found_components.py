"""Components that their methods find move a behaviour on prompts that nothing was chosen on, and
further than random ones do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from finding import lab_of, planted, rate

from surgery.find.components import Components
from surgery.find.interface import Lab, Proposal, Ranking
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import load_stimuli

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
CAPITALS, POLYGLOT = FIXTURES / "capitals-gpt2", FIXTURES / "polyglot-llama"
DRAWS = 20


def stimuli(model: Path, *names: str) -> tuple[Stimulus, ...]:
    return load_stimuli([model / "stimuli" / f"{name}.jsonl" for name in names])


def gains(
    lab: Lab, finder: Components, ranking: Ranking, size: int, held: list[Stimulus], folder: Path
) -> tuple[float, list[float]]:
    """How far the best `size` components move the goal the wanted way on held-out prompts, and how
    far as many random ones do."""
    chosen, generator = list(range(size)), np.random.default_rng(0)
    tokens = lab.goal.metric.new_tokens(4)
    before = rate(lab, lab.goal.name, held, tokens)

    def gain(proposal: Proposal) -> float:
        with planted(lab, proposal, folder / "recipe"):
            return lab.goal.sign * (rate(lab, lab.goal.name, held, tokens) - before)

    found = gain(finder.propose(lab, ranking, chosen))
    draws = [finder.draw(lab, ranking, chosen, generator) for _ in range(DRAWS)]
    return found, list(map(gain, draws))


@pytest.mark.campaign
@pytest.mark.parametrize("goal", [("answer_rate:remembered", 1), ("answer_rate:stated", -1)])
def test_components_of_heads_decide_which_capital_is_said(
    goal: tuple[str, int], tmp_path: Path
) -> None:
    """Five of 512 components, all of layer 0, whose heads the fixture says decide."""
    train = stimuli(CAPITALS, "train")
    lab = lab_of(CAPITALS, train, tmp_path / "journal", *goal, budget=64)
    finder = Components(method="effect", on="head")
    ranking = finder.rank(lab)
    assert {int(row[0]) for row in ranking.rows[:5]} == {0}
    held = list(stimuli(CAPITALS, "target"))
    found, random = gains(lab, finder, ranking, 5, held, tmp_path)
    assert found > 0.25
    assert found > np.percentile(random, 95) + 0.15


@pytest.mark.campaign
def test_components_of_the_head_hold_the_habit_of_english(tmp_path: Path) -> None:
    """Ten of 128 components, by the size of EigenShift's difference."""
    train = stimuli(POLYGLOT, "english-train")
    metric = "line_pass_rate:en,de,fr,ru,ar"
    lab = lab_of(POLYGLOT, train, tmp_path / "journal", metric, 1, budget=32)
    finder = Components(against="english", absolute=True)
    ranking = finder.rank(lab)
    held = [s for s in stimuli(POLYGLOT, "english-holdout") if s.set == "target"]
    found, random = gains(lab, finder, ranking, 10, held, tmp_path)
    assert found > 0.3
    assert found > np.percentile(random, 95) + 0.1


def test_what_is_held_out_was_not_looked_at() -> None:
    for model, train, held in (
        (CAPITALS, "train", "target"),
        (POLYGLOT, "english-train", "english-holdout"),
    ):
        asked = {stimulus.prompt for stimulus in stimuli(model, train)}
        assert not asked & {stimulus.prompt for stimulus in stimuli(model, held)}
