"""A lab for a finder, and what a proposal of it does to the live model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.differential.workload import end_tokens
from surgery.editor import Editor
from surgery.find.interface import Finder, Goal, Lab, Proposal, Ranking
from surgery.find.journal import Journal
from surgery.metrics import Observed, make_metric
from surgery.plan import make_plan
from surgery.recipe import load_recipe
from surgery.runtimes.generate import Generation, generate
from surgery.runtimes.interface import ModelRef
from surgery.runtimes.pytorch import TorchRuntime
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import TOKENIZER, Tokenizer, tokens_of


def lab_of(
    model: Path,
    train: Sequence[Stimulus],
    journal: Path,
    goal: str = "answer_rate:right",
    sign: int = 1,
    budget: int = 3,
) -> Lab:
    """A lab of a checkpoint folder; with its tokenizer, if it has one."""
    checkpoint = Checkpoint.open(model)
    return Lab(
        checkpoint,
        identify(checkpoint),
        TorchRuntime(ModelRef("torch", model, "causal-lm"), 1),
        Tokenizer(model) if (model / TOKENIZER).is_file() else None,
        tuple(train),
        Goal(goal, make_metric(goal), sign),
        0,
        budget,
        "recipe.safetensors",
        Journal(journal),
        lambda what, done, of: None,
    )


@contextmanager
def planted(lab: Lab, proposal: Proposal, folder: Path) -> Iterator[None]:
    """While entered, the live model does what the proposed recipe does, by its edits' hooks."""
    path = folder / "recipe.json"
    document = {"schema": 1, "untie": proposal.untie, "edits": [dict(e) for e in proposal.entries]}
    path.write_text(json.dumps(document))
    editor = Editor(make_plan(load_recipe(path), lab.checkpoint))
    with ExitStack() as stack:
        for index, edit in enumerate(editor.plan.edits):
            state = editor.state(index)
            stack.enter_context(edit.hook(lab.live, editor.plan.arch, state))
        yield


def score(lab: Lab, held: Sequence[Stimulus], new_tokens: int) -> float:
    """The goal's metric of the live model as it is, from its greedy responses."""
    sizes, tokenizer = lab.arch.sizes, lab.tokenizer
    assert tokenizer is not None
    ids = tokens_of(held, tokenizer, sizes["vocab"], sizes["positions"])
    prompts = tuple(ids[stimulus.id] for stimulus in held)
    [made] = generate(lab.runtime, [Generation(prompts, new_tokens, end_tokens(lab.checkpoint))])
    responses = tuple(map(tokenizer.decode, made.tokens))
    return lab.goal.metric.score(Observed(tuple(held), responses, np.empty(0)))


def gains(
    lab: Lab,
    finder: Finder,
    ranking: Ranking,
    size: int,
    draws: int,
    held: Sequence[Stimulus],
    new_tokens: int,
    folder: Path,
) -> tuple[float, NDArray[np.float64]]:
    """How far the best `size` candidates move the goal the wanted way on held-out prompts, and how
    far as many random ones do, [draws]."""
    before, chosen = score(lab, held, new_tokens), list(range(size))
    generator = np.random.default_rng(0)

    def gain(proposal: Proposal) -> float:
        with planted(lab, proposal, folder):
            return lab.goal.sign * (score(lab, held, new_tokens) - before)

    found = gain(finder.propose(lab, ranking, chosen))
    random = [gain(finder.draw(lab, ranking, chosen, generator)) for _ in range(draws)]
    return found, np.array(random)
