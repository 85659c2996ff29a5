"""Logit differences: how far a live model prefers one answer to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surgery.find.prompts.questions import Question
from surgery.find.prompts.rows import Inputs

Pairs = tuple[Any, Any]
"""Token ids [batch] of the goal's answers and of the others, as torch tensors."""


def pairs_of(model: Any, inputs: Inputs, questions: Sequence[Question]) -> Pairs:
    """The two tokens of every question: where no other is named, the likeliest in a clean run."""
    import torch

    answers = torch.tensor([question.answer for question in questions])
    if all(question.other is not None for question in questions):
        return answers, torch.tensor([question.other for question in questions])
    with torch.no_grad():
        scores = last_logits(model, inputs).clone()
    scores.scatter_(1, answers[:, None], -torch.inf)
    likeliest = scores.argmax(1).tolist()
    named = [question.other for question in questions]
    others = [one if one is not None else two for one, two in zip(named, likeliest, strict=True)]
    return answers, torch.tensor(others)


def margins(model: Any, inputs: Inputs, pairs: Pairs) -> Any:
    """The logit of each answer less that of the other [batch], at the last position."""
    answer, other = (tokens[:, None] for tokens in pairs)
    scores = last_logits(model, inputs)
    return (scores.gather(1, answer) - scores.gather(1, other)).squeeze(1)


def last_logits(model: Any, inputs: Inputs) -> Any:
    """Logits [batch, vocab] after the last token of each prompt."""
    return model(**inputs, use_cache=False).logits[:, -1]
