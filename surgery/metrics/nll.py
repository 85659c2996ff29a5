"""Negative log-likelihood of the text itself, in nats per token: the logarithm of perplexity."""

from __future__ import annotations

from typing import ClassVar

from surgery.metrics.interface import Metric, Needs, Observed, mean
from surgery.stimuli import Stimulus


class NegativeLogLikelihood(Metric):
    """`nll`: mean over the kept positions of every prompt; a change of 0.095 is 10% perplexity."""

    unit: ClassVar[str] = "nats per token"
    needs: ClassVar[Needs] = "token_nll"

    def applies(self, stimulus: Stimulus) -> bool:
        return True

    def score(self, observed: Observed) -> float:
        return mean(observed.token_nll)
