"""How an answer goes on from its prompt, in text and in tokens."""

from __future__ import annotations

from surgery.stimuli.prompts import Tokenizer
from surgery.stimuli.scripts import is_unspaced

Row = tuple[int, ...]


def spaced(prompt: str, answer: str) -> str:
    """The answer as it follows the prompt: after a space, unless either brings white space or the
    answer's script has none between words."""
    there = prompt[-1:].isspace() or answer[:1].isspace() or is_unspaced(answer[0])
    return answer if there else f" {answer}"


def joined(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[Row, Row]:
    """Prompt and answer tokenised as one text: the tokens before the answer, and those of it. A
    token that reaches across belongs to the answer."""
    return tokenizer.split(prompt, spaced(prompt, answer))


def following(tokenizer: Tokenizer, prompt: str, answer: str) -> Row | None:
    """The tokens that a model, run on the prompt, would go on with to give the answer.

    None where the answer adds none or changes those of the prompt: that is no way to go on.
    """
    before, after = joined(tokenizer, prompt, answer)
    return after if after and before == tokenizer.encode(prompt) else None
