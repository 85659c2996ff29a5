"""What PyTorch's noise was measured by: the float64 reference, and a run in the graph's type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from surgery.differential.corners import Ran
from surgery.evidence import Finding
from surgery.metrics.distance import UNITS
from surgery.runtimes.child import Outcome
from surgery.runtimes.interface import FLOAT32
from surgery.stimuli import Batch

Kept = dict[str, NDArray[Any]]


def faults(ran: Ran) -> Iterator[Finding]:
    """Runs that did not end well: without them nothing says what an error is to be held to."""
    named = [(name, "float64", outcome) for name, outcome in ran.references.items()]
    named += [(name, ran.dtype(name), outcome) for name, outcome in ran.narrow.items()]
    for name, dtype, outcome in named:
        if outcome.status != "ok":
            message = f"the {dtype} reference of {name} ended {outcome.status}: {outcome.detail}"
            yield Finding("run", outcome.status, f"{name} in {dtype}", message)


def whole(outcomes: Mapping[str, Outcome], batch: Batch) -> Kept:
    """What each run that ended well kept of a batch."""
    return {
        name: outcome.outputs(batch.name)
        for name, outcome in outcomes.items()
        if outcome.status == "ok" and not outcome.facts(batch.name).problem
    }


def comparable(ran: Ran, edge: tuple[str, str], kept: Kept, references: Kept, narrow: Kept) -> bool:
    """Whether both corners of an edge are there, in one shape, and what their noise is."""
    t, r = edge
    measured = t in references and (t in narrow or t not in ran.narrow)
    return measured and t in kept and r in kept and kept[t].shape == kept[r].shape


def coarsest(ran: Ran) -> str:
    """The type of least precision that a graph computes in."""
    return max(map(ran.dtype, ran.references), key=lambda name: UNITS[name], default=FLOAT32)
