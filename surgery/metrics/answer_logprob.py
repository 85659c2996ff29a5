"""How probable a model finds an answer, whatever it would say itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from surgery.metrics.interface import Metric, Needs, Observed, mean
from surgery.stimuli import Stimulus


class AnswerLogProbability(Metric):
    """`answer_logprob:NAME`: the mean log-probability of the tokens of an answer after the prompt,
    each given those before it (teacher forcing), averaged over prompts.

    Of several answers that `answers[NAME]` lists, the one with the largest mean counts. An answer
    follows the prompt after a space, unless there is white space or its script has none.
    """

    unit: ClassVar[str] = "nats per token"
    needs: ClassVar[Needs] = "answer_logprobs"

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def asks(self, stimulus: Stimulus) -> tuple[str, ...]:
        return (stimulus.answers or {}).get(self.answer, ())

    def applies(self, stimulus: Stimulus) -> bool:
        return bool(self.asks(stimulus))

    def score(self, observed: Observed) -> float:
        return mean(list(self._best(observed)))

    def _best(self, observed: Observed) -> Iterator[float]:
        pairs = zip(observed.stimuli, observed.answer_logprobs, strict=False)
        for stimulus, known in pairs:
            # An answer that was not run is NaN, which `max` of Python may drop.
            found = [mean(known.get(answer, ())) for answer in self.asks(stimulus)]
            if found:
                yield max(found) if all(value == value for value in found) else float("nan")
