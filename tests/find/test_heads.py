"""`find heads`: the ranking is the mean of exact effects, whatever the budget, and can go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.edits.heads import HeadsFields
from surgery.edits.selection import read_scores
from surgery.errors import FindError
from surgery.find import FINDERS
from surgery.find.heads import Heads
from surgery.find.interface import Goal, Lab, Ranking
from surgery.find.journal import Journal
from surgery.find.outputs import table_of
from surgery.find.scores.patching import Patching
from surgery.metrics import make_metric
from surgery.runtimes.interface import ModelRef
from surgery.runtimes.pytorch import TorchRuntime
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import Tokenizer, load_stimuli

FIXTURE = Path(__file__).parents[2] / "fixtures" / "capitals-gpt2"
LAYERS = HEADS = 4


def lab_of(train: tuple[Stimulus, ...], folder: Path, **changes: Any) -> Lab:
    checkpoint = Checkpoint.open(FIXTURE)
    name = "answer_rate:remembered"
    lab = Lab(
        checkpoint=checkpoint,
        arch=identify(checkpoint),
        runtime=TorchRuntime(ModelRef("torch", FIXTURE, "causal-lm"), 1),
        tokenizer=Tokenizer(FIXTURE),
        train=train,
        goal=Goal(name, make_metric(name), 1),
        seed=0,
        budget=64,
        tensors="found.safetensors",
        journal=Journal(folder),
        progress=lambda what, done, total: None,
    )
    return replace(lab, **changes)


@pytest.fixture(scope="module")
def train() -> tuple[Stimulus, ...]:
    """Prompts of two lengths; the first of them have a corrupted twin of their own."""
    every = load_stimuli([FIXTURE / "stimuli" / "train.jsonl"])[:9]
    return (*(replace(s, corrupted=_twin(s)) for s in every[:4]), *every[4:])


def _twin(stimulus: Stimulus) -> str:
    """The same question about another country, with the same capital stated."""
    assert stimulus.prompt is not None
    country = stimulus.prompt.split()[3]
    other = "Montenegro" if country == "Malta" else "Malta"
    return stimulus.prompt.replace(country, other)


@pytest.fixture
def lab(train: tuple[Stimulus, ...], tmp_path: Path) -> Lab:
    return lab_of(train, tmp_path / "journal")


def scores(ranking: Ranking, column: str = "score") -> Any:
    """[layers, heads] of a column."""
    found = np.full((LAYERS, HEADS), np.nan)
    places = zip(ranking.column("layer"), ranking.column("head"), strict=True)
    for (layer, head), value in zip(places, ranking.column(column), strict=True):
        found[int(layer), int(head)] = value
    return found


def by_hand(lab: Lab) -> Any:
    """Mean effects on the remembered and the stated answer, [layers, heads, 2]: the prompts with a
    twin, one at a time and unpadded, and each head exchanged in the whole model."""
    model, tokenizer = lab.live, lab.tokenizer
    assert tokenizer is not None
    outputs = [block.attn.c_proj for block in model.transformer.h]

    def run(text: str, held: Any) -> tuple[Any, Any]:
        seen: list[Any] = [None] * LAYERS

        def hook(layer: int) -> Any:
            def change(module: Any, given: Any) -> Any:
                seen[layer] = given[0].clone()
                return given if held is None else (held[layer],)

            return change

        hooks = [o.register_forward_pre_hook(hook(n)) for n, o in enumerate(outputs)]
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer.encode(text)]), use_cache=False).logits[0, -1]
        for handle in hooks:
            handle.remove()
        return logits.double(), seen

    total, count = np.zeros((LAYERS, HEADS, 2)), 0
    for stimulus in lab.train:
        if stimulus.corrupted is None or stimulus.prompt is None or stimulus.answers is None:
            continue
        count += 1
        answers = [stimulus.answers[name][0] for name in ("remembered", "stated")]
        watched = [tokenizer.encode(answer)[0] for answer in answers]
        base, clean = run(stimulus.prompt, None)
        _, corrupted = run(stimulus.corrupted, None)
        for layer in range(LAYERS):
            for head in range(HEADS):
                held = [z.clone() for z in clean]
                size = held[layer].shape[-1] // HEADS
                own = slice(head * size, (head + 1) * size)
                held[layer][0, -1, own] = corrupted[layer][0, -1, own]
                total[layer, head] += (run(stimulus.prompt, held)[0] - base)[watched].numpy()
    return total / count


@pytest.mark.parametrize("positions", ["last", "all"])
def test_the_score_is_the_mean_exact_change_of_raised_over_rival(lab: Lab, positions: str) -> None:
    own = replace(lab, train=lab.train[1:3])
    ranking = Heads(positions=positions).rank(own)
    wanted = by_hand(own)
    np.testing.assert_allclose(scores(ranking, "raised"), wanted[..., 0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(scores(ranking, "rival"), wanted[..., 1], rtol=0, atol=1e-4)
    score = wanted[..., 0] - wanted[..., 1]
    np.testing.assert_allclose(scores(ranking), score, rtol=0, atol=1e-4)
    assert np.abs(score).max() > 0.1
    assert ranking.column("score") == sorted(ranking.column("score"), reverse=True)
    assert ranking.facts["prompts"] == 2


@pytest.mark.parametrize("method", Heads.methods)
def test_the_budget_changes_nothing_but_the_memory(lab: Lab, method: str, tmp_path: Path) -> None:
    wide = scores(Heads(method=method).rank(lab))
    narrow = replace(lab, budget=3, journal=Journal(tmp_path / "narrow"))
    np.testing.assert_allclose(scores(Heads(method=method).rank(narrow)), wide, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("positions", "budget"), [("last", 30), ("all", 150), ("all", 1)])
def test_no_more_tokens_than_the_budget_run_at_once(
    lab: Lab, positions: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for one prompt, where the budget is less."""
    seen: list[int] = []
    for block in lab.live.transformer.h:
        block.ln_2.register_forward_hook(
            lambda module, given, out: seen.append(out[..., 0].numel())
        )
    own = replace(lab, budget=budget, train=lab.train[:4])
    Heads(positions=positions).rank(own)
    assert max(seen) <= max(budget, 20)
    assert max(seen) > budget / 2


def test_a_goal_to_be_lowered_turns_the_ranking_round(lab: Lab, tmp_path: Path) -> None:
    up = scores(Heads().rank(lab))
    down = replace(lab, goal=replace(lab.goal, sign=-1), journal=Journal(tmp_path / "down"))
    ranking = Heads().rank(down)
    np.testing.assert_array_equal(scores(ranking), -up)
    assert (ranking.facts["raised"], ranking.facts["rival"]) == ("stated", "remembered")


def test_what_a_search_has_found_is_not_computed_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Heads().rank(lab)
    monkeypatch.setattr(Patching, "record", lambda *_: pytest.fail("recorded again"))
    assert Heads().rank(lab) == first


def test_a_search_that_was_stopped_goes_on_with_the_layer_it_was_at(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Heads().rank(replace(lab, journal=Journal(tmp_path / "whole")))
    array = Journal.array

    def stop(self: Journal, name: str, compute: Any) -> Any:
        if "path L2" in name:
            raise KeyboardInterrupt
        return array(self, name, compute)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "array", stop)
        with pytest.raises(KeyboardInterrupt):
            Heads().rank(lab)
    layers: list[int] = []
    logits = Patching.logits

    def count(self: Patching, first: int, *rest: Any) -> Any:
        layers.append(first)
        return logits(self, first, *rest)

    monkeypatch.setattr(Patching, "logits", count)
    assert Heads().rank(lab) == whole
    assert {2, 3} <= set(layers) and 1 not in layers


def test_the_facts_tell_what_was_used_and_how_the_methods_agree(lab: Lab) -> None:
    told: list[tuple[str, int, int]] = []
    lab = replace(lab, progress=lambda *step: told.append(step))
    facts = Heads().rank(lab).facts
    used, left_out = facts["prompts"], facts["left_out"]
    assert used + sum(left_out.values()) == len(lab.train)
    assert facts["corrupted"]["given"] == 4 and facts["corrupted"]["drawn"] == used - 4
    assert set(facts["rank_correlation"]) == {"direct", "gradient"}
    assert facts["rank_correlation"]["direct"] > 0.5
    assert set(Heads(method="direct").rank(lab).facts["rank_correlation"]) == {"gradient"}
    assert told[-1][1] == told[-1][2] > 0


def test_a_proposal_is_a_recipe_entry_that_zeroes_the_heads(lab: Lab) -> None:
    ranking = Ranking(("layer", "head", "score"), ((2.0, 1.0, 3.0), (0.0, 3.0, 2.0)))
    [entry] = Heads().propose(lab, ranking, [0, 1]).entries
    fields = HeadsFields.model_validate(entry)
    assert fields.heads == ["L2H1", "L0H3"]
    assert fields.factor == 0.0


def test_a_recipe_reads_the_file_of_every_head(lab: Lab, tmp_path: Path) -> None:
    ranking = Heads(method="direct").rank(lab)
    (tmp_path / "heads.csv").write_text(table_of(ranking))
    read = read_scores(tmp_path / "heads.csv", ("layer", "head"))
    assert read == [((row[0], row[1]), row[2]) for row in ranking.rows]


def test_the_registry_has_it() -> None:
    assert FINDERS["heads"] is Heads


@pytest.mark.parametrize(
    ("finder", "message"),
    [
        (Heads(method="paths"), "expected a method of path, direct, gradient"),
        (Heads(positions="first"), "positions of last, all"),
        (Heads(method="direct", positions="all"), "method direct reads the last position"),
        (Heads(against="nobody"), "no such other answer; they have 'stated'"),
    ],
)
def test_options_that_make_no_sense_are_refused(lab: Lab, finder: Heads, message: str) -> None:
    with pytest.raises(FindError, match=message):
        finder.rank(lab)


def test_effects_that_are_no_numbers_are_refused(lab: Lab) -> None:
    with torch.no_grad():
        lab.live.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FindError, match="effects on these prompts are not finite"):
        Heads().rank(lab)
