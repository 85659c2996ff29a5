"""`line_pass_rate` as a behaviour metric: see `surgery.metrics.line_pass_rate` for the measure."""

from __future__ import annotations

from surgery.metrics.interface import Observed
from surgery.metrics.languages import LanguageRate
from surgery.metrics.line_pass_rate import line_pass_rate


class LinePassRate(LanguageRate):
    """`line_pass_rate` or `line_pass_rate:en,fr,ru`: responses in an accepted language only.

    Accepted codes are the stimulus's `answers.language`; the argument names the languages the
    detector chooses among (by default all it knows).
    """

    def __init__(self, candidates: str = "") -> None:
        super().__init__("line_pass_rate", candidates.split(",") if candidates else [])

    def score(self, observed: Observed) -> float:
        judged = list(self.judged(observed))
        responses, languages = [r for r, _ in judged], [a for _, a in judged]
        return line_pass_rate(responses, languages, detect=self.detect)
