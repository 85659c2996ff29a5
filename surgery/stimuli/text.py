"""Real text as a probe: sentences in many languages, a line of code, in the model's own tokens."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np

from surgery.errors import StimuliError
from surgery.stimuli.batches import pad
from surgery.stimuli.interface import Batch
from surgery.stimuli.prompts import TOKENIZER, Tokenizer

NAME = "probe/text"
TOKENS = 96


def text_batch(folder: Path, vocab: int, positions: int, seed: int) -> Batch | None:
    """One row of at most 96 tokens, of sentences in an order that follows from `seed`.

    None for a checkpoint without a tokenizer, or whose tokenizer knows so few words that less than
    a quarter of the tokens are different ones. Raises `StimuliError` where it is not the model's.
    """
    if not (folder / TOKENIZER).is_file():
        return None
    lines = files("surgery.stimuli").joinpath("sentences.txt").read_text(encoding="utf-8")
    sentences = lines.splitlines()
    order = np.random.default_rng((seed, len(sentences), TOKENS)).permutation(len(sentences))
    ids = Tokenizer(folder).encode("\n".join(sentences[index] for index in order))
    ids = ids[: min(TOKENS, positions)]
    if not ids or max(ids) >= vocab:
        found = f"token {max(ids)}" if ids else "no token"
        raise StimuliError(
            f"{folder / TOKENIZER}: gives {found} for plain text; this model takes 0 to {vocab - 1}"
        )
    telling = 4 * len(set(ids)) >= len(ids)
    return pad(NAME, "probe", [ids], "left", ("text",)) if telling else None
