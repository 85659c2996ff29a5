"""A/A runs: a corner's model again with one thing about the run changed, against the corner itself.

What differs there no conversion explains: threads, the way attention is computed, what ONNX
Runtime optimises. Beside them, what rounding the weights to a narrower type does, and computing in
it. Each is a child of its own, and its outputs are gone once compared.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.differential.corners import Pair, Progress, Ran
from surgery.differential.workload import Workload
from surgery.evidence import EDGES, Finding, Repeat
from surgery.export.tasks import Task
from surgery.metrics.distance import UNITS, Spread
from surgery.metrics.ratio import divide
from surgery.metrics.shape import Distribution, in_units, position_scale
from surgery.runtimes.child import Job, Limits, Outcome, default_threads, run
from surgery.runtimes.interface import FLOAT32, ModelRef
from surgery.stimuli import Batch

NARROW = ("bfloat16", "float16")
UNOPTIMISED = ("disabled", "basic", "extended")


@dataclass(frozen=True)
class Variant:
    """One thing changed about a run; `kind` as in `Repeat`."""

    name: str
    kind: str
    model: ModelRef
    threads: int | None = None


def variants(model: ModelRef) -> Iterator[Variant]:
    """The runs a model is compared with itself by."""
    threads = 1 if default_threads() > 1 else 2
    yield Variant(f"{threads} thread{'s' * (threads > 1)}", "run", model, threads)
    if model.runtime == "onnxruntime":
        for level in UNOPTIMISED:
            yield Variant(f"optimisation {level}", "run", replace(model, level=level))
        return
    yield Variant("attention eager", "run", replace(model, attention="eager"))
    for dtype in NARROW:
        yield Variant(f"stored in {dtype}", "storage", replace(model, stored=dtype))
        yield Variant(f"computed in {dtype}", "compute", replace(model, dtype=dtype))


def repeat(
    ran: Ran,
    pairs: Mapping[str, Pair],
    task: Task,
    workload: Workload,
    scratch: Path,
    limits: Limits,
    progress: Progress,
) -> tuple[tuple[Repeat, ...], tuple[Finding, ...]]:
    """Every variant of every corner that ended well; a variant that did not is a finding."""
    rows: list[Repeat] = []
    faults: list[Finding] = []
    for edge, pair in pairs.items():
        t, r = EDGES[edge]
        onnx = ModelRef("onnxruntime", pair.onnx, task.name, initializers=pair.initializers)
        for name, model in ((t, ModelRef("torch", pair.model, task.name)), (r, onnx)):
            for variant in variants(model) if ran.corners[name].status == "ok" else ():
                progress(f"{name}: {variant.name}")
                folder = scratch / f"{name}-again"
                folder.mkdir()
                job = Job(variant.model, folder, workload.batches, threads=variant.threads)
                outcome = run(job, limits)
                own = tuple(_row(ran, (name, t), variant, outcome, workload, task.output))
                rows += own
                faults += _faults(name, variant, outcome, workload, own)
                shutil.rmtree(folder)
    return tuple(rows), tuple(faults)


def _faults(
    corner: str, variant: Variant, outcome: Outcome, workload: Workload, rows: Sequence[Repeat]
) -> Iterator[Finding]:
    """A variant that did not end well, or was not compared at every position."""
    site = f"{corner}/{variant.name}"
    if outcome.status != "ok":
        message = f"{corner} with {variant.name} ended {outcome.status}: {outcome.detail}"
        yield Finding("run", outcome.status, site, message)
        return
    wanted = sum(len(batch.selected) for batch in workload.batches)
    compared = sum(row.positions for row in rows)
    if compared != wanted:
        message = f"{corner} with {variant.name} was compared at {compared} of {wanted} positions"
        yield Finding("coverage", "not measured", site, message, float(compared), float(wanted))


@dataclass
class _Sums:
    difference: Spread = field(default_factory=Spread)
    units: Distribution = field(default_factory=Distribution)
    noise: Spread = field(default_factory=Spread)
    scale: Spread = field(default_factory=Spread)
    positions: int = 0
    nonfinite: int = 0

    def add(
        self,
        one: NDArray[Any],
        other: NDArray[Any],
        torch: NDArray[Any],
        reference: NDArray[Any],
        unit: float,
    ) -> None:
        """Adds arrays [n, features]: both runs, PyTorch, and the reference that tells its noise;
        `unit` is the unit roundoff of what is computed in."""
        finite = np.isfinite(one) & np.isfinite(other)
        self.nonfinite += int(np.count_nonzero(np.isfinite(one) != np.isfinite(other)))
        wide = np.where(finite, other, 0).astype(np.float64) - np.where(finite, one, 0)
        noise = torch - reference
        self.difference.add(wide)
        self.units.add(in_units(wide, position_scale(noise, reference, unit)))
        self.noise.add(noise)
        self.scale.add(reference)
        self.positions += len(wide)


def _row(
    ran: Ran,
    corners: tuple[str, str],
    variant: Variant,
    outcome: Outcome,
    workload: Workload,
    output: str,
) -> Iterator[Repeat]:
    """The row of one variant of the first of `corners`; the second is whose noise it is held to."""
    corner, noisy = corners
    unit = UNITS[ran.dtype(noisy) if corner != noisy else FLOAT32]
    sums = _Sums()
    for batch in workload.batches if outcome.status == "ok" else ():
        arrays = _arrays(ran, corner, noisy, outcome, batch)
        if arrays is not None:
            one, other, torch, reference = arrays
            sums.add(one, other, torch, reference, unit)
    if sums.positions:
        yield _repeat(corner, variant, output, sums, unit)


def _arrays(
    ran: Ran, corner: str, noisy: str, outcome: Outcome, batch: Batch
) -> tuple[NDArray[Any], ...] | None:
    """Both runs, PyTorch where its noise is taken, and the reference, if all are of one shape."""
    narrow = ran.narrow.get(noisy) if corner != noisy else None
    runs = (ran.corners[corner], outcome, narrow or ran.corners[noisy], ran.references.get(noisy))
    if any(own is None or own.status != "ok" or own.facts(batch.name).problem for own in runs):
        return None
    found = tuple(own.outputs(batch.name) for own in runs if own is not None)
    return found if len({array.shape for array in found}) == 1 else None


def _repeat(corner: str, variant: Variant, output: str, sums: _Sums, unit: float) -> Repeat:
    median, p99 = sums.units.histogram.magnitudes((0.5, 0.99))
    noise_max = max(sums.noise.largest, unit * sums.scale.largest)
    noise_l2 = max(sums.noise.l2, unit * sums.scale.l2)
    return Repeat(
        corner=corner,
        variant=variant.name,
        kind=variant.kind,
        output=output,
        positions=sums.positions,
        nonfinite=sums.nonfinite,
        max_abs=sums.difference.largest,
        l2=sums.difference.l2,
        median=median,
        p99=p99,
        max=sums.units.largest,
        ratio_max=divide(sums.difference.largest, noise_max),
        ratio_l2=divide(sums.difference.l2, noise_l2),
    )
