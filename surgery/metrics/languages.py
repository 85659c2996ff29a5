"""What the metrics of the Language Confusion Benchmark share: languages, and who tells them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import ClassVar

from surgery.errors import PolicyError
from surgery.metrics.interface import Metric, Needs, Observed
from surgery.metrics.line_pass_rate import DETECTOR, langid_detector
from surgery.stimuli import Stimulus

RESPONSE_TOKENS = 32
ANSWER = "language"


class LanguageRate(Metric):
    """A rate over responses whose languages `answers.language` accepts; the detector chooses among
    `candidates`, or all it knows."""

    unit: ClassVar[str] = "share of responses"
    needs: ClassVar[Needs] = "responses"

    def __init__(self, name: str, candidates: Sequence[str]) -> None:
        # The model is read once, and a language it lacks is an error before anything runs.
        try:
            self.detect = langid_detector(candidates or None)
        except ValueError as error:
            raise PolicyError(f"{name}:{','.join(candidates)}: {error}") from None
        self._languages = f"languages {', '.join(candidates)}" if candidates else "all languages"

    @property
    def method(self) -> str:
        name, comma, how = DETECTOR.partition(",")
        return f"{name} {version(name)}{comma}{how}, {self._languages}"

    def new_tokens(self, longest_answer: int) -> int:
        return RESPONSE_TOKENS

    def applies(self, stimulus: Stimulus) -> bool:
        return ANSWER in (stimulus.answers or {})

    def judged(self, observed: Observed) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each response it applies to, and the languages that are accepted of it."""
        for stimulus, response in zip(observed.stimuli, observed.responses, strict=True):
            if self.applies(stimulus):
                yield response, (stimulus.answers or {})[ANSWER]
