"""What a behaviour metric gets to see, and the contract of its class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from surgery.stimuli import Stimulus

Needs = Literal["responses", "token_nll", "kl", "answer_logprobs"]
"""Which field of `Observed` a metric reads."""

POSITIONS: tuple[Needs, ...] = ("token_nll", "kl")
"""Those that have a number for each kept position; the others have something for each text."""


@dataclass(frozen=True)
class Observed:
    """One corner on one stimulus set.

    `responses` are greedy continuations as text, one per stimulus, or empty where no metric
    asked for them; `token_nll` the negative log-probability in nats of each real next token at
    the kept positions; `kl` KL(original || this model) in nats at the kept positions, in the
    same runtime; `answer_logprobs`, one per stimulus, the log-probability in nats of each token
    of the answers that a metric `asks`, by the answer's text.
    """

    stimuli: tuple[Stimulus, ...]
    responses: tuple[str, ...]
    token_nll: NDArray[np.float64]
    kl: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    answer_logprobs: tuple[Mapping[str, tuple[float, ...]], ...] = ()


class Metric(ABC):
    """A number that names a behaviour.

    `unit` is what it is counted in; `relative`: a change is a share of the original's number,
    edited / original - 1, and the number of several texts their weighted geometric mean; `files`:
    where it has an argument, the constructor takes after it the `WordList`s that the argument
    mentions, by name; `origin`: the package that brings it, and its version.
    """

    unit: ClassVar[str]
    needs: ClassVar[Needs]
    relative: ClassVar[bool] = False
    files: ClassVar[bool] = False
    origin: ClassVar[str] = ""

    @property
    def method(self) -> str:
        """What the number depends on beside its definition: a detector, a list of words."""
        return ""

    def new_tokens(self, longest_answer: int) -> int:
        """How many tokens a response needs; `longest_answer` is in tokens."""
        return 0

    def asks(self, stimulus: Stimulus) -> tuple[str, ...]:
        """The answers whose log-probabilities it needs."""
        return ()

    @abstractmethod
    def applies(self, stimulus: Stimulus) -> bool:
        """Whether the metric says anything about this stimulus."""

    @abstractmethod
    def score(self, observed: Observed) -> float:
        """The metric over the stimuli it applies to; NaN where there are none."""


def mean(values: Sequence[float] | NDArray[np.float64]) -> float:
    """The arithmetic mean in float64; NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")
