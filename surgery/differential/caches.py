"""What a graph gives besides its output: caches `present.N.key|value`, and an encoder's pooled
output. Each is compared, the worst reported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from surgery.errors import quote
from surgery.evidence import Finding
from surgery.export.tasks import POOLED
from surgery.metrics.distance import ConversionSums
from surgery.runtimes.child import Outcome
from surgery.runtimes.graph import PRESENT

Sums = dict[tuple[str, str], ConversionSums]
"""By edge and output."""


def add(
    sums: Sums,
    edge: str,
    batch: str,
    where: list[str],
    outcomes: Sequence[Outcome],
    dtype: str = "float32",
) -> None:
    """Adds one batch's caches at the positions `where`: `outcomes` are those of PyTorch, of its
    float64 reference, of ONNX Runtime and, where the graph computes in another `dtype` than
    float32, of PyTorch in that. A cache that PyTorch returns and that one of them did
    not keep, or in another shape, is counted at no position."""
    kept = [outcome.caches(batch) for outcome in outcomes]
    for name in (fact.name for fact in outcomes[0].facts(batch).outputs):
        if name.startswith(PRESENT) or name == POOLED:
            own = sums.setdefault((edge, name), ConversionSums(dtype))
            arrays = [found[name] for found in kept if name in found]
            if len(arrays) == len(kept) and len({array.shape for array in arrays}) == 1:
                own.add(where, *arrays)


def unmeasured(outputs: Mapping[str, ConversionSums], sums: Sums) -> Iterator[Finding]:
    """Where the output was compared, so was every cache, at as many positions."""
    for edge, output in outputs.items():
        counts = [own.positions for (of, _), own in sums.items() if of == edge]
        if not counts or set(counts) != {output.positions}:
            least = min(counts, default=0)
            message = f"{edge}: a cache was compared at {least} of {output.positions} positions"
            yield Finding("coverage", "not measured", f"{edge}/{PRESENT}N", message)


def unknown(corner: str, names: Iterable[str], batch: str) -> Iterator[Finding]:
    """Those of the outputs `names`, which PyTorch has not, that are caches: of more layers."""
    for name in sorted(names):
        if name.startswith(PRESENT):
            message = f"{corner}: has output {name}, which PyTorch has not, on {quote(batch)}"
            yield Finding("interface", "extra output", f"{corner}/{name}/{batch}", message)


def worst(sums: Sums) -> Iterator[tuple[str, str, ConversionSums]]:
    """The worst cache of each edge, and of every edge those that are the worst of another.

    A cache per layer and part would bury the rest of a report; the worst one is judged for all.
    """
    # Nothing but zeros on both sides, as an edit may leave them, is no worst of anything.
    compared = {key: own for key, own in sums.items() if own.scale.largest or own.error.largest}
    edges = dict.fromkeys(edge for edge, _ in compared)
    listed = dict.fromkeys(_worst(compared, edge) for edge in edges)
    for edge in edges:
        for name in listed:
            if (edge, name) in compared:
                yield edge, name, compared[edge, name]


def _worst(sums: Sums, edge: str) -> str:
    ratios = {name: max(map(_rank, _ratios(own))) for (e, name), own in sums.items() if e == edge}
    return max(ratios, key=lambda name: ratios[name])


def _ratios(own: ConversionSums) -> tuple[float, float, float]:
    return own.ratio_max, own.ratio_l2, own.ratio_position


def _rank(ratio: float) -> float:
    """What is no number is worse than any."""
    return float("inf") if np.isnan(ratio) else ratio
