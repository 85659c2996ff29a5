"""Questions: where two answers to a prompt part."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.errors import FindError, quote
from surgery.find.interface import Lab
from surgery.find.prompts.rows import Row
from surgery.stimuli import Stimulus
from surgery.stimuli.answers import following


@dataclass(frozen=True)
class Question:
    """A prompt, with what both answers begin with, and the tokens that then tell them apart.

    `other` is None where no other answer is named: then it is the likeliest other token.
    """

    ids: Row
    answer: int
    other: int | None


def questions_of(lab: Lab, name: str) -> list[Question]:
    """The training prompts of one set that name the goal's answer; raises `FindError` where none
    does."""
    asked = [_question(lab, stimulus) for stimulus in lab.of_set(name)]
    questions = [question for question in asked if question is not None]
    if not questions:
        raise FindError(
            f"{quote(lab.goal.name)}: no training prompt of set {name} has an answer that a token "
            "tells from others; give prompts as text with answers, and a goal answer_rate:NAME"
        )
    return questions


def _answers(lab: Lab, stimulus: Stimulus) -> tuple[str, ...]:
    """What counts as the goal's answer to a prompt."""
    if not lab.goal.name.startswith("answer_rate:"):
        return ()
    return (stimulus.answers or {}).get(lab.goal.argument, ())


def _question(lab: Lab, stimulus: Stimulus) -> Question | None:
    """None where the goal's answer cannot be told from the others that are named by a token, or
    the model has no room for what they share."""
    answers = _answers(lab, stimulus)
    if not answers or stimulus.prompt is None or lab.tokenizer is None:
        return None
    prompt = lab.tokenizer.encode(stimulus.prompt)
    own = following(lab.tokenizer, stimulus.prompt, answers[0])
    if own is None or not prompt:
        return None
    named = (stimulus.answers or {}).items()
    others = [text for name, texts in named if name != lab.goal.argument for text in texts]
    if not others:
        return Question(prompt, own[0], None)
    for other in others:
        theirs = following(lab.tokenizer, stimulus.prompt, other) or ()
        pairs = enumerate(zip(own, theirs, strict=False))
        parting = next((at for at, (one, two) in pairs if one != two), None)
        if parting is not None and len(prompt) + parting <= lab.arch.sizes["positions"]:
            return Question(prompt + own[:parting], own[parting], theirs[parting])
    return None
