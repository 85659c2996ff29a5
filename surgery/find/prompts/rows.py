"""Prompts as rows of token ids, and the live model run on a few of them at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from surgery.errors import FindError
from surgery.find.interface import Lab
from surgery.runtimes.generate import left_padded
from surgery.runtimes.pytorch import TorchRuntime
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import tokens_of

Row = tuple[int, ...]
Inputs = Mapping[str, Any]
"""What the model's forward takes of left-padded prompts: torch tensors [batch, length]."""

WHOLE = 32
"""Whole prompts that run at once, at most: a budget counts rows of one position."""


def refuse_encoder(lab: Lab, what: str) -> None:
    """Raises `FindError` for a model that predicts no next token."""
    if lab.arch.facts.kind != "decoder":
        raise FindError(f"{what} needs a decoder; {lab.arch.family} is an encoder")


def token_rows(lab: Lab, stimuli: Sequence[Stimulus]) -> list[Row]:
    """The token ids of each prompt; raises `StimuliError` for what the model cannot take."""
    sizes = lab.arch.sizes
    found = tokens_of(stimuli, lab.tokenizer, sizes["vocab"], sizes["positions"])
    return [found[stimulus.id] for stimulus in stimuli]


def prompts_of(lab: Lab, name: str) -> list[Row]:
    """The token ids of the training prompts of one set; raises `FindError` where it has none."""
    stimuli = lab.of_set(name)
    if not stimuli:
        raise FindError(f"the training prompts hold none of set {name}; give some in --train")
    return token_rows(lab, stimuli)


def pieces(count: int, budget: int) -> Iterator[slice]:
    """Prompts 0 to `count` in slices of at most `budget`, and of no more than run at once."""
    size = min(budget, WHOLE)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def inputs_of(runtime: TorchRuntime, rows: Sequence[Row]) -> Inputs:
    """`rows` as one batch for a live model, padded left."""
    import torch

    padded = left_padded([list(row) for row in rows])
    return {name: torch.from_numpy(padded[name]) for name in runtime.input_names}


def is_real(inputs: Inputs) -> Any:
    """Which positions of a batch hold a token, a torch bool tensor [batch, length]."""
    return inputs["attention_mask"].bool()
