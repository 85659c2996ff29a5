"""`line_pass_rate` as a behaviour metric: see `surgery.metrics.line_pass_rate` for the measure."""

from __future__ import annotations

from typing import ClassVar

from surgery.metrics.interface import Metric, Needs, Observed
from surgery.metrics.line_pass_rate import line_pass_rate
from surgery.stimuli import Stimulus

RESPONSE_TOKENS = 32
ANSWER = "language"


class LinePassRate(Metric):
    """`line_pass_rate` or `line_pass_rate:en,fr,ru`: responses in an accepted language only.

    Accepted codes are the stimulus's `answers.language`; the argument names the languages the
    detector chooses among (by default all it knows).
    """

    unit: ClassVar[str] = "share of responses"
    needs: ClassVar[Needs] = "responses"

    def __init__(self, candidates: str = "") -> None:
        self.candidates = candidates.split(",") if candidates else None

    def new_tokens(self, longest_answer: int) -> int:
        return RESPONSE_TOKENS

    def applies(self, stimulus: Stimulus) -> bool:
        return ANSWER in (stimulus.answers or {})

    def score(self, observed: Observed) -> float:
        judged = [
            (response, (stimulus.answers or {})[ANSWER])
            for stimulus, response in zip(observed.stimuli, observed.responses, strict=True)
            if self.applies(stimulus)
        ]
        responses, languages = [r for r, _ in judged], [a for _, a in judged]
        return line_pass_rate(responses, languages, candidates=self.candidates)
