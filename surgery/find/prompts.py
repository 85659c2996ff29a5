"""Prompts as the live model takes them, and questions: where two answers to one part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import FindError, quote
from surgery.find.interface import Lab
from surgery.runtimes.generate import left_padded
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import tokens_of

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Fed:
    """A batch of left-padded prompts: what the model takes, and which positions are real, a torch
    bool tensor [batch, length]."""

    inputs: dict[str, Any]
    real: Any

    @property
    def shape(self) -> tuple[int, int]:
        batch, length = self.real.shape
        return batch, length


@dataclass(frozen=True)
class Question:
    """A prompt, with what both answers begin with, and the tokens that then tell them apart.

    `other` is None where no other answer is named: then it is the likeliest other token.
    """

    ids: Ids
    answer: int
    other: int | None


def prompts_of(lab: Lab, name: str) -> list[Ids]:
    """The token ids of the training prompts of one set; raises `FindError` where it has none."""
    stimuli = lab.of_set(name)
    if not stimuli:
        raise FindError(f"the training prompts hold none of set {name}; give some in --train")
    return list(_encoded(lab, stimuli).values())


def questions_of(lab: Lab, name: str) -> list[Question]:
    """The training prompts of one set that name the goal's answer; raises `FindError` where none
    does."""
    asked = [stimulus for stimulus in lab.of_set(name) if _answers(lab, stimulus)]
    ids = _encoded(lab, asked)
    found = [_question(lab, stimulus, ids[stimulus.id]) for stimulus in asked]
    questions = [question for question in found if question is not None]
    if not questions:
        raise FindError(
            f"{quote(lab.goal.name)}: no training prompt of set {name} has an answer that a token "
            "tells from others; give prompts as text with answers, and a goal answer_rate:NAME"
        )
    return questions


def fed(lab: Lab, rows: Sequence[Ids]) -> Fed:
    """`rows` as one left-padded batch."""
    import torch

    every = {name: torch.from_numpy(v) for name, v in left_padded([[*r] for r in rows]).items()}
    inputs = {name: every[name] for name in lab.runtime.input_names}
    return Fed(inputs, every["attention_mask"].bool())


def parts(count: int, size: int) -> Iterator[slice]:
    """`count` rows as slices of at most `size`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _encoded(lab: Lab, stimuli: Sequence[Stimulus]) -> dict[str, Ids]:
    sizes = lab.arch.sizes
    return tokens_of(stimuli, lab.tokenizer, sizes["vocab"], sizes["positions"])


def _answers(lab: Lab, stimulus: Stimulus) -> tuple[str, ...]:
    """What counts as the goal's answer to a prompt that is text."""
    goal = lab.goal
    if not goal.name.startswith("answer_rate:") or stimulus.prompt is None:
        return ()
    return (stimulus.answers or {}).get(goal.argument, ())


def _question(lab: Lab, stimulus: Stimulus, ids: Ids) -> Question | None:
    """None where the goal's answer cannot be told from the others that are named by a token."""
    own = next(iter(_continuations(lab, stimulus, ids, _answers(lab, stimulus))), ())
    named = (stimulus.answers or {}).items()
    others = [text for name, texts in named if name != lab.goal.argument for text in texts]
    if own and not others:
        return Question(ids, own[0], None)
    for theirs in _continuations(lab, stimulus, ids, others):
        pairs = enumerate(zip(own, theirs, strict=False))
        parting = next((at for at, (one, two) in pairs if one != two), None)
        if parting is not None and len(ids) + parting <= lab.arch.sizes["positions"]:
            return Question(ids + own[:parting], own[parting], theirs[parting])
    return None


def _continuations(
    lab: Lab, stimulus: Stimulus, ids: Ids, answers: Sequence[str]
) -> list[tuple[int, ...]]:
    """The tokens that each answer adds to those of the prompt; without those that change these."""
    prompt, tokenizer = stimulus.prompt or "", lab.tokenizer
    if tokenizer is None:
        return []
    gap = "" if prompt[-1:].isspace() else " "
    whole = [tokenizer.encode(f"{prompt}{gap}{answer.strip()}") for answer in answers]
    return [found[len(ids) :] for found in whole if found[: len(ids)] == ids]
