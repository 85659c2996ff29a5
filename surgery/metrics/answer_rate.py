"""Answer rate: how often the greedy answer is one of the named ones (PH3, arXiv 2402.18154).

R_m = f_m / (f_m + f_c + f_o): the share of prompts whose continuation starts with an answer
called m, among all prompts that have such an answer. A continuation is the memory's, the context's
or another: where it starts with answers of several names, the longest is the one it gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from surgery.metrics.interface import Metric, Needs, Observed, mean
from surgery.stimuli import Stimulus


class AnswerRate(Metric):
    """`answer_rate:NAME`: a response starts with one of `answers[NAME]`, at a word's end."""

    unit: ClassVar[str] = "share of prompts"
    needs: ClassVar[Needs] = "responses"

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def new_tokens(self, longest_answer: int) -> int:
        # One more, so that "Lima" is not taken for the start of "Limassol" cut short.
        return longest_answer + 1

    def applies(self, stimulus: Stimulus) -> bool:
        return self.answer in (stimulus.answers or {})

    def score(self, observed: Observed) -> float:
        pairs = zip(observed.stimuli, observed.responses, strict=True)
        return mean(
            [
                float(self.answer in given_names(response, stimulus.answers or {}))
                for stimulus, response in pairs
                if self.applies(stimulus)
            ]
        )


def given_names(response: str, answers: Mapping[str, tuple[str, ...]]) -> set[str]:
    """The names of the answer that `response` gives: several where the same answer has several."""
    found = {
        name: max((len(a.strip()) for a in listed if starts_with(response, (a,))), default=0)
        for name, listed in answers.items()
    }
    longest = max(found.values(), default=0)
    return {name for name, length in found.items() if length == longest > 0}


def starts_with(response: str, answers: tuple[str, ...]) -> bool:
    """Whether `response` starts with an answer that ends at a word's end; spaces around either
    do not count."""
    return any(re.match(rf"{re.escape(a.strip())}(?!\w)", response.lstrip()) for a in answers)
