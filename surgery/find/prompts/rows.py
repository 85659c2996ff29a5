"""Prompts as rows of token ids, and the live model run on a few of them at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from surgery.errors import FindError
from surgery.find.interface import Lab
from surgery.runtimes.generate import left_padded
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import tokens_of

Row = tuple[int, ...]

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


def pieces(count: int, budget: int) -> Iterator[slice]:
    """Prompts 0 to `count` in slices of at most `budget`, and of no more than run at once."""
    size = min(budget, WHOLE)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def inputs_of(lab: Lab, rows: Sequence[Row]) -> dict[str, Any]:
    """`rows` as one batch for the live model, padded left: torch tensors [rows, longest]."""
    import torch

    padded = left_padded([list(row) for row in rows])
    return {name: torch.from_numpy(padded[name]) for name in lab.runtime.input_names}
