"""The interaction on every stimulus set, and of every stimulus by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from surgery.evidence import CORNERS, Interaction, StimulusInteraction
from surgery.metrics.distance import InteractionSums
from surgery.stimuli import Batch

Kept = dict[str, NDArray[Any]]

WORST = 10
"""How many stimuli of a set are kept: those whose interaction is the largest over its noise."""


@dataclass
class Interactions:
    """Sums by stimulus set, and by set and stimulus."""

    sets: dict[str, InteractionSums] = field(default_factory=dict)
    stimuli: dict[tuple[str, str], InteractionSums] = field(default_factory=dict)

    def add(self, batch: Batch, kept: Kept, references: Kept, narrow: Kept, dtype: str) -> None:
        """Adds what the four corners, and both references, kept of a batch; nothing where one of
        them kept nothing or another shape. `narrow` is PyTorch in the type its graph computes in,
        where that is not float32, and `dtype` the coarsest of both graphs' types."""
        same = len({array.shape for array in kept.values()}) == 1
        if not same or set(kept) != set(CORNERS) or set(references) != {"T_o", "T_e"}:
            return
        whole = self.sets.setdefault(batch.stimulus_set, InteractionSums(dtype))
        whole.add(kept, references, narrow)
        for row, stimulus in enumerate(batch.rows):
            own = batch.selected[:, 0] == row
            parts = [
                {name: a[own] for name, a in run.items()} for run in (kept, references, narrow)
            ]
            key = (batch.stimulus_set, stimulus)
            self.stimuli.setdefault(key, InteractionSums(dtype)).add(*parts)

    def of_sets(self, output: str) -> Iterator[Interaction]:
        for stimulus_set, own in self.sets.items():
            yield Interaction(
                stimulus_set=stimulus_set,
                output=output,
                effect=own.effect.l2,
                norm=own.interaction.l2,
                ratio=own.ratio,
                rho=own.rho,
                noise=own.noise_l2,
                noise_ratio=own.noise_ratio,
            )

    def of_stimuli(self) -> Iterator[StimulusInteraction]:
        """The worst of every set, the worst first."""
        for name in self.sets:
            own = {key: sums for key, sums in self.stimuli.items() if key[0] == name}
            worst = sorted(own, key=lambda key: -_rank(self.stimuli[key].noise_ratio))
            for key in worst[:WORST]:
                sums = self.stimuli[key]
                yield StimulusInteraction(
                    *key, sums.effect.l2, sums.ratio, sums.rho, sums.noise_ratio
                )


def _rank(ratio: float) -> float:
    """What is no number is worse than any."""
    return math.inf if math.isnan(ratio) else ratio
