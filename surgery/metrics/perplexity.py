"""Perplexity of the text itself: the exponential of its negative log-likelihood per token."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from surgery.metrics.interface import Metric, Needs, Observed, mean
from surgery.stimuli import Stimulus


class Perplexity(Metric):
    """`perplexity`: exp(`nll`), the geometric mean of 1 / p(next token). A change is a ratio less
    1: 0.1 is 10% more, as a change of 0.095 in `nll` is."""

    unit: ClassVar[str] = "perplexity"
    needs: ClassVar[Needs] = "token_nll"
    relative: ClassVar[bool] = True

    def applies(self, stimulus: Stimulus) -> bool:
        return True

    def score(self, observed: Observed) -> float:
        with np.errstate(over="ignore"):
            return float(np.exp(mean(observed.token_nll)))
