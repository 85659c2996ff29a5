"""How often a response is an answer and nothing more."""

from __future__ import annotations

import unicodedata
from typing import ClassVar

from surgery.metrics.interface import Metric, Needs, Observed, mean
from surgery.metrics.line_pass_rate import is_punctuation
from surgery.stimuli import Stimulus

MORE_TOKENS = 4
"""Tokens beyond the longest answer: what goes on after an answer must be seen to go on."""


class ExactMatch(Metric):
    """`exact_match:NAME`: the first line of a response is one of `answers[NAME]`, both normalised
    as `normalised` says."""

    unit: ClassVar[str] = "share of prompts"
    needs: ClassVar[Needs] = "responses"

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def new_tokens(self, longest_answer: int) -> int:
        return longest_answer + MORE_TOKENS

    def applies(self, stimulus: Stimulus) -> bool:
        return self.answer in (stimulus.answers or {})

    def score(self, observed: Observed) -> float:
        pairs = zip(observed.stimuli, observed.responses, strict=True)
        return mean(
            [
                float(matches(response, (stimulus.answers or {})[self.answer]))
                for stimulus, response in pairs
                if self.applies(stimulus)
            ]
        )


def matches(response: str, answers: tuple[str, ...]) -> bool:
    """Whether the first line that holds anything is an answer. Base models go on after it."""
    first = response.strip().split("\n", 1)[0]
    return normalised(first) in {normalised(answer) for answer in answers}


def normalised(text: str) -> str:
    """Unicode NFKC, case-folded, punctuation and white space at both ends gone, and white space
    within it one space."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    joined = " ".join(words)
    kept = [n for n, c in enumerate(joined) if not (c == " " or is_punctuation(c))]
    return joined[kept[0] : kept[-1] + 1] if kept else joined
