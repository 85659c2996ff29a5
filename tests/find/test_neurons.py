"""`find neurons` on a model that slips into English, and its sibling that was tuned not to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Zoo

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.editor import Editor
from surgery.errors import FindError
from surgery.find import FINDERS
from surgery.find import neurons as module
from surgery.find.interface import Goal, Lab, Proposal, Ranking
from surgery.find.journal import Journal
from surgery.find.neurons import Neurons
from surgery.find.prompts import points
from surgery.find.scores import neuron_totals
from surgery.find.scores.neuron_scores import Attribution
from surgery.metrics import make_metric
from surgery.metrics.line_pass_rate import langid_detector, line_pass_rate
from surgery.plan import make_plan
from surgery.recipe import parse_recipe
from surgery.runtimes.generate import Generation, generate
from surgery.runtimes.interface import ModelRef
from surgery.runtimes.pytorch import TorchRuntime
from surgery.stimuli.prompts import Tokenizer, load_stimuli, tokens_of

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
BASE, TUNED = FIXTURES / "polyglot-llama", FIXTURES / "polyglot-llama-tuned"
LANGUAGES = "en,de,fr,ru,ar"
NEURONS = 3 * 768
FEW = 8
"""Training prompts, of which about half are confused."""

Make = Callable[..., Lab]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A lab of a model, on the first prompts of the training stimuli. Each model is loaded once,
    and what is found of one on so many prompts is kept in one journal."""
    runtimes: dict[Path, TorchRuntime] = {}
    journals = tmp_path_factory.mktemp("journals")

    def made(model: Path = BASE, prompts: int | None = FEW, **changes: Any) -> Lab:
        checkpoint = Checkpoint.open(model)
        if model not in runtimes:
            runtimes[model] = TorchRuntime(ModelRef("torch", model, "causal-lm"), 1)
        name = f"line_pass_rate:{LANGUAGES}"
        lab = Lab(
            checkpoint,
            identify(checkpoint),
            runtimes[model],
            Tokenizer(BASE),
            load_stimuli([BASE / "stimuli" / "train.jsonl"])[:prompts],
            Goal(name, make_metric(name), 1),
            seed=0,
            budget=256,
            tensors="recipe.safetensors",
            journal=Journal(journals / f"{model.name} {prompts}"),
            progress=lambda what, done, of: None,
        )
        return replace(lab, **changes)

    return made


@pytest.fixture(scope="module")
def ranking(make: Make) -> Ranking:
    return Neurons(tuned=TUNED, new_tokens=12).rank(make())


def test_it_is_the_registered_finder_of_neurons() -> None:
    assert FINDERS["neurons"] is Neurons
    assert Neurons().method == Neurons.methods[0] == "attribution"


def test_neurons_come_by_how_far_their_score_falls_to_the_sibling(ranking: Ranking) -> None:
    assert ranking.columns == ("layer", "neuron", "score", "base", "tuned", "count")
    scores, base, tuned, count = map(ranking.column, ("score", "base", "tuned", "count"))
    assert scores == sorted(scores, reverse=True) and scores[0] > 1
    assert scores == pytest.approx(np.array(base) - np.array(tuned))
    assert 0 < max(count) <= ranking.facts["confusion_points"] <= ranking.facts["confused"] <= FEW


def test_never_more_than_a_fiftieth_of_all_neurons(ranking: Ranking) -> None:
    assert len(ranking.rows) == int(NEURONS / 50) == 46
    assert ranking.facts["neurons"] == NEURONS


def test_facts_tell_detector_and_prompts(ranking: Ranking) -> None:
    named = "py3langid, normalised probabilities, languages ar, de, en, fr, ru"
    assert ranking.facts["detector"] == named
    assert ranking.facts["prompts"] == FEW
    assert 0 < ranking.facts["generated_tokens"] <= FEW * 12


def test_at_a_prompt_only_the_highest_count(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron_totals, "HIGHEST", 3)
    found = Neurons(new_tokens=12).rank(make())
    assert found.columns == ("layer", "neuron", "score", "base", "count")
    assert sum(found.column("count")) == 3 * found.facts["confusion_points"]
    assert all(
        (score != 0) == (n > 0)
        for score, n in zip(found.column("score"), found.column("count"), strict=True)
    )


@pytest.mark.parametrize(
    "method", ["ablation", pytest.param("gradient", marks=pytest.mark.campaign)]
)
def test_the_other_methods_know_some_of_the_same_neurons(
    make: Make, ranking: Ranking, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 6 of 2304 by chance, 0.02."""
    monkeypatch.setattr(module, "ABLATED", 6)
    found = Neurons(method=method, tuned=TUNED, new_tokens=12).rank(make())
    assert len(found.rows) == (6 if method == "ablation" else 46)
    assert found.facts.get("ablated") == (6 if method == "ablation" else None)
    assert len(first_six(ranking) & first_six(found)) >= 2


def first_six(ranking: Ranking) -> set[tuple[float, ...]]:
    return {row[:2] for row in ranking.rows[:6]}


def test_the_area_tells_target_from_preserved_prompts(make: Make) -> None:
    preserve = load_stimuli([BASE / "stimuli" / "preserve.jsonl"])[:10]
    lab = make()
    found = Neurons(method="auroc").rank(replace(lab, train=(*lab.train, *preserve)))
    assert found.columns == ("layer", "neuron", "score", "auroc")
    assert found.column("score") == found.column("auroc")
    assert 0.9 < found.column("auroc")[0] <= 1
    assert found.facts["projection"] == "gate_proj"
    assert (found.facts["target"], found.facts["preserve"]) == (FEW, 10)


def test_the_proposal_sets_the_chosen_neurons_to_zero(make: Make, ranking: Ranking) -> None:
    proposal = Neurons().propose(make(), ranking, [2, 0])
    chosen = [ranking.rows[index][:2] for index in (2, 0)]
    addresses = [f"L{layer}N{neuron}" for layer, neuron in chosen]
    assert proposal == Proposal(({"op": "neurons", "neurons": addresses, "factor": 0.0},))


def test_a_random_draw_is_of_the_whole_model_but_for_the_chosen(
    make: Make, ranking: Ranking
) -> None:
    lab, chosen = make(), list(range(40))
    taken = {f"L{int(row[0])}N{int(row[1])}" for row in ranking.rows[:40]}
    drawn: set[str] = set()
    for seed in range(20):
        entry = Neurons().draw(lab, ranking, chosen, np.random.default_rng(seed)).entries[0]
        assert len(set(entry["neurons"])) == 40 and not taken & set(entry["neurons"])
        drawn |= set(entry["neurons"])
    assert len(drawn) > 500
    again = Neurons().draw(lab, ranking, chosen, np.random.default_rng(19)).entries[0]
    assert again == entry


def test_what_was_found_is_not_computed_again(
    make: Make, ranking: Ranking, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(points, "generate", fail)
    monkeypatch.setattr(Attribution, "scores", fail)
    assert Neurons(tuned=TUNED, new_tokens=12).rank(make()) == ranking
    with pytest.raises(AssertionError, match="computed again"):
        Neurons(tuned=TUNED, new_tokens=12).rank(make(prompts=4))


def test_a_model_that_is_not_confused_has_nothing_to_find(make: Make) -> None:
    with pytest.raises(FindError, match="none of 4 target prompts is answered in English"):
        Neurons(new_tokens=9).rank(make(TUNED, prompts=4))


def test_prompts_must_say_their_languages(make: Make) -> None:
    lab = make()
    bare = tuple(replace(stimulus, answers=None) for stimulus in lab.train)
    for changes in ({"train": bare}, {"tokenizer": None}):
        with pytest.raises(FindError, match=r"need a tokenizer\.json and target prompts with"):
            Neurons().rank(replace(lab, **changes))
    with pytest.raises(FindError, match="needs prompts of set target and of set preserve"):
        Neurons(method="auroc").rank(lab)


def test_a_sibling_must_be_of_the_models_sizes(make: Make, zoo: Zoo) -> None:
    with pytest.raises(FindError, match="a tuned sibling has the model's family and sizes"):
        Neurons(tuned=zoo.checkpoint("llama"), new_tokens=8).rank(make(prompts=4))


@pytest.mark.parametrize("model", ["mixtral", "bert"])
def test_experts_and_encoders_are_refused(make: Make, zoo: Zoo, model: str) -> None:
    arch = identify(Checkpoint.open(zoo.checkpoint(model)))
    with pytest.raises(FindError, match=f"{model}: neurons are found in decoders without experts"):
        Neurons().rank(make(arch=arch))


# --- what the edit does --------------------------------------------------------------------------


@contextmanager
def hooked(lab: Lab, proposal: Proposal) -> Iterator[None]:
    """The proposal as hooks on the live model."""
    [entry] = proposal.entries
    text = f"schema: 1\nedits: [{{op: neurons, neurons: {entry['neurons']}, factor: 0.0}}]"
    plan = make_plan(parse_recipe(text, "proposal", BASE), lab.checkpoint)
    editor, [edit] = Editor(plan), plan.edits
    with edit.hook(lab.live, lab.arch, editor.state(0)):
        yield


def pass_rate(lab: Lab, stimuli: Any, judge: Any) -> float:
    """LPR of greedy responses of 32 tokens, in points."""
    tokens = tokens_of(stimuli, lab.tokenizer, lab.arch.sizes["vocab"], 512)
    prompts = tuple(tokens[stimulus.id] for stimulus in stimuli)
    [made] = generate(
        lab.runtime, [Generation(prompts, 32, (lab.checkpoint.config["eos_token_id"],))]
    )
    assert lab.tokenizer is not None
    told = [lab.tokenizer.decode(response) for response in made.tokens]
    return 100 * line_pass_rate(told, [s.answers["language"] for s in stimuli], detect=judge)


def nats(lab: Lab, texts: list[str]) -> float:
    """Mean nats per token."""
    import torch

    assert lab.tokenizer is not None
    found: list[float] = []
    for text in texts:
        ids = torch.tensor([lab.tokenizer.encode(text)])
        with torch.no_grad():
            logp = lab.live(ids).logits[0, :-1].log_softmax(-1)
        found += (-logp.gather(1, ids[0, 1:, None])[:, 0]).tolist()
    return math.fsum(found) / len(found)


@pytest.mark.campaign
def test_eight_neurons_found_on_training_prompts_end_the_confusion_on_held_out_ones(
    make: Make,
) -> None:
    """At least 25 points and four fifths of what tuning gains, perplexity within a twentieth, and
    no more than 3 points by chance."""
    lab, judge = make(prompts=None), langid_detector(LANGUAGES.split(","))
    held_out = load_stimuli([BASE / "stimuli" / "target.jsonl"])
    preserve = load_stimuli([BASE / "stimuli" / "preserve.jsonl"])
    plain = [str(s.prompt) for s in preserve if "-plain-" in s.id]
    finder = Neurons(tuned=TUNED)
    found = finder.rank(lab)
    chosen = list(range(8))
    assert len(chosen) <= 0.02 * NEURONS
    before, cost = pass_rate(lab, held_out, judge), nats(lab, plain)
    whole = pass_rate(make(TUNED), held_out, judge) - before
    with hooked(lab, finder.propose(lab, found, chosen)):
        gain = pass_rate(lab, held_out, judge) - before
        cost = nats(lab, plain) - cost
    assert gain >= max(25, 0.8 * whole)
    assert math.expm1(cost) <= 0.05
    chance = []
    for seed in range(20):
        drawn = finder.draw(lab, found, chosen, np.random.default_rng(seed))
        with hooked(lab, drawn):
            chance.append(pass_rate(lab, held_out, judge) - before)
    assert np.mean(chance) <= 3
