"""`line_pass_rate` as a behaviour metric: see `surgery.metrics.line_pass_rate` for the measure."""

from __future__ import annotations

from typing import ClassVar

from surgery.errors import PolicyError
from surgery.metrics.interface import Metric, Needs, Observed
from surgery.metrics.line_pass_rate import langid_detector, line_pass_rate
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
        # The model is read once, and a language it lacks is an error before anything runs.
        try:
            self.detect = langid_detector(candidates.split(",") if candidates else None)
        except ValueError as error:
            raise PolicyError(f"line_pass_rate:{candidates}: {error}") from None

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
        return line_pass_rate(responses, languages, detect=self.detect)
