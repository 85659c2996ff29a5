"""How far an edit moved the next-token distributions, in nats per token."""

from __future__ import annotations

from typing import ClassVar

from surgery.metrics.interface import Metric, Needs, Observed, mean
from surgery.stimuli import Stimulus


class KullbackLeibler(Metric):
    """`kl`: mean KL(original || this model) over the kept positions, in one runtime; of the
    original itself 0, so that its change is the drift that `preserve.max_kl` limits."""

    unit: ClassVar[str] = "nats per token"
    needs: ClassVar[Needs] = "kl"

    def applies(self, stimulus: Stimulus) -> bool:
        return True

    def score(self, observed: Observed) -> float:
        return mean(observed.kl)
