"""What a behaviour metric gets to see, and the contract of its class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from surgery.stimuli import Stimulus

Needs = Literal["responses", "token_nll"]


@dataclass(frozen=True)
class Observed:
    """One corner on one stimulus set.

    `responses` are greedy continuations as text, one per stimulus, or empty where no metric
    asked for them; `token_nll` the negative log-probability in nats of each real next token at
    the kept positions.
    """

    stimuli: tuple[Stimulus, ...]
    responses: tuple[str, ...]
    token_nll: NDArray[np.float64]


class Metric(ABC):
    """A number that names a behaviour; `unit` is what it is counted in."""

    unit: ClassVar[str]
    needs: ClassVar[Needs]

    def new_tokens(self, longest_answer: int) -> int:
        """How many tokens a response needs; `longest_answer` is in tokens."""
        return 0

    @abstractmethod
    def applies(self, stimulus: Stimulus) -> bool:
        """Whether the metric says anything about this stimulus."""

    @abstractmethod
    def score(self, observed: Observed) -> float:
        """The metric over the stimuli it applies to; NaN where there are none."""


def mean(values: Sequence[float] | NDArray[np.float64]) -> float:
    """The arithmetic mean in float64; NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")
