"""What each part of a streamed graph brings in, and what it passes on, beside float32 noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.differential.corners import Ran
from surgery.evidence import EDGES, LayerError
from surgery.runtimes import Cut
from surgery.runtimes.child import Outcome
from surgery.runtimes.interface import INTRODUCED, STREAM
from surgery.stimuli import Batch

Array = NDArray[Any] | None


@dataclass
class _Sums:
    """The largest of each difference over batches; `scale` is the largest number."""

    noise: float = 0.0
    scale: float = 0.0
    introduced: float = 0.0
    propagated: float = 0.0

    def add(self, single: Array, wide: Array, given: Array, own: Array) -> None:
        """PyTorch's values in float32 and float64, and ONNX Runtime's from PyTorch's inputs and
        from its own, of one shape; one that is not there is off by infinity."""
        if single is not None and wide is not None:
            self.noise = max(self.noise, _largest(single, wide))
            self.scale = max(self.scale, float(np.abs(wide).max(initial=0.0)))
        self.introduced = max(self.introduced, _largest(given, single))
        self.propagated = max(self.propagated, _largest(own, wide))


def layer_errors(ran: Ran, batches: Sequence[Batch], output: str) -> Iterator[LayerError]:
    """Every part of every edge that was cut and whose corners all ran, in order."""
    for edge, cuts in ran.cuts.items():
        torch, onnx = EDGES[edge]
        outcomes = [ran.corners[torch], ran.references[torch], ran.corners[onnx]]
        if cuts and all(outcome.status == "ok" for outcome in outcomes):
            yield from _of_edge(edge, outcomes, batches, cuts, output)


def _of_edge(
    edge: str,
    outcomes: Sequence[Outcome],
    batches: Sequence[Batch],
    cuts: Sequence[Cut],
    output: str,
) -> Iterator[LayerError]:
    names = [f"{cut.role}.{cut.layer}" if cut.layer is not None else cut.role for cut in cuts]
    for number, (begin, end) in enumerate(zip(["inputs", *names], [*names, output], strict=True)):
        sums = _Sums()
        for batch in batches:
            if number < len(cuts):
                sums.add(*_streams(outcomes, batch, number))
            elif not any(outcome.facts(batch.name).problem for outcome in outcomes):
                single, wide, own = (outcome.outputs(batch.name) for outcome in outcomes)
                sums.add(single, wide, outcomes[2].part(batch.name), own)
        # No less than a rounding of the largest number.
        noise = max(sums.noise, sums.scale * float(np.finfo(np.float32).eps) / 2, 1e-30)
        yield LayerError(edge, begin, end, noise, sums.introduced / noise, sums.propagated / noise)


def _streams(outcomes: Sequence[Outcome], batch: Batch, cut: int) -> Iterator[Array]:
    real = batch.attention_mask.astype(bool)
    torch, wide, onnx = outcomes
    for outcome, kind in ((torch, STREAM), (wide, STREAM), (onnx, INTRODUCED), (onnx, STREAM)):
        found = outcome.stream(kind, batch.name, cut)
        yield found[real] if found is not None and found.shape[:2] == real.shape else None


def _largest(found: Array, expected: Array) -> float:
    if found is None or expected is None or found.shape != expected.shape:
        return float("inf")
    difference = np.abs(found.astype(np.float64) - expected)
    return float(difference.max(initial=0.0)) if np.isfinite(difference).all() else float("inf")
