"""A model on the bench: what a finder gets, and what a proposal does to the live model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.editor import Editor
from surgery.find.interface import Goal, Lab, Proposal
from surgery.find.journal import Journal
from surgery.metrics import Observed, make_metric
from surgery.plan import make_plan
from surgery.recipe import load_recipe
from surgery.runtimes.generate import Generation, generate
from surgery.runtimes.interface import ModelRef
from surgery.runtimes.pytorch import TorchRuntime
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import TOKENIZER, Tokenizer, tokens_of

TENSORS = "recipe.safetensors"


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
        TENSORS,
        Journal(journal),
        lambda name, done, count: None,
    )


@contextmanager
def planted(lab: Lab, proposal: Proposal, folder: Path) -> Iterator[None]:
    """While entered, the live model does what the proposed recipe does, by its edits' hooks."""
    folder.mkdir(parents=True, exist_ok=True)
    if proposal.tensors:
        save_file(dict(proposal.tensors), folder / TENSORS)
    edits = [dict(entry) for entry in proposal.entries]
    text = json.dumps({"schema": 1, "untie": proposal.untie, "edits": edits}, default=str)
    (folder / "recipe.json").write_text(text)
    recipe = load_recipe(folder / "recipe.json", allow_outside=True)
    editor = Editor(make_plan(recipe, lab.checkpoint))
    with ExitStack() as stack:
        for index, edit in enumerate(editor.plan.edits):
            hook = edit.hook(lab.live, editor.plan.arch, editor.state(index))
            stack.enter_context(hook)
        yield


def rate(lab: Lab, metric_name: str, stimuli: Sequence[Stimulus], new_tokens: int = 5) -> float:
    """A behaviour metric of the live model as it is, from its greedy responses."""
    sizes, tokenizer = lab.arch.sizes, lab.tokenizer
    assert tokenizer is not None
    ids = tokens_of(stimuli, tokenizer, sizes["vocab"], sizes["positions"])
    config: Any = lab.live.config
    asked = Generation(tuple(ids[s.id] for s in stimuli), new_tokens, (config.eos_token_id,))
    [made] = generate(lab.runtime, [asked])
    responses = tuple(tokenizer.decode(tokens) for tokens in made.tokens)
    metric = make_metric(metric_name)
    return metric.score(Observed(tuple(stimuli), responses, np.zeros(0)))
