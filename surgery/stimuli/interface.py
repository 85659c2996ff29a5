"""The inputs a differential run feeds to every corner."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SETS = ("target", "preserve", "probe")


@dataclass(frozen=True)
class Stimulus:
    """One line of a stimuli file: a prompt, or token ids in its place.

    `corrupted` is the prompt with what it turns on replaced, for methods that contrast the two.
    """

    id: str
    set: str
    prompt: str | None = None
    input_ids: tuple[int, ...] | None = None
    answers: dict[str, tuple[str, ...]] | None = None
    corrupted: str | None = None


@dataclass(frozen=True)
class Batch:
    """One input of the models, rectangular, with the positions whose outputs are kept.

    `input_ids`, `attention_mask` and `position_ids` are int64 [batch, length]; `selected` is
    int64 [n, 2] of (row, column), real (unmasked) positions only; `rows` names the stimulus of
    each row. A graph with a cache runs the first `split` columns, then the others over the cache
    that those left; with 0 all at once.
    """

    name: str
    stimulus_set: str
    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    selected: NDArray[np.int64]
    rows: tuple[str, ...]
    split: int = 0

    def inputs(self) -> dict[str, NDArray[np.int64]]:
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }
