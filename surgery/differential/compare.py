"""Outcomes of the corners to `Evidence`: batch by batch, so that memory follows one batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.differential import caches, noise, profiles
from surgery.differential.answers import logprobs_of
from surgery.differential.behaviour import BehaviourSums, drifts
from surgery.differential.corners import Ran
from surgery.differential.effects import observe
from surgery.differential.interactions import Interactions
from surgery.differential.intervals import intervals
from surgery.differential.layers import layer_errors
from surgery.differential.responses import partings, responses_of, texts_of
from surgery.differential.workload import Workload
from surgery.errors import quote
from surgery.evidence import (
    CORNERS,
    EDGES,
    Conversion,
    Corner,
    Evidence,
    Finding,
)
from surgery.export.tasks import Task
from surgery.metrics.distance import UNITS, ConversionSums
from surgery.runtimes.child import Outcome, OutputFact
from surgery.stimuli import Batch

Kept = dict[str, NDArray[Any]]


@dataclass
class Sums:
    """Everything that is added up over batches."""

    conversion: dict[str, ConversionSums] = field(default_factory=dict)
    caches: caches.Sums = field(default_factory=dict)
    interaction: Interactions = field(default_factory=Interactions)
    behaviour: BehaviourSums = field(default_factory=BehaviourSums)


def compare(ran: Ran, workload: Workload, task: Task) -> Evidence:
    """The evidence of one run. What could not be compared is a fault, never left out."""
    faults = [*_interface_faults(ran, workload, task), *_embedding_faults(ran, workload)]
    sums = Sums()
    for batch in workload.batches:
        _add_batch(sums, ran, batch, task)
    besides = task.cache or sums.caches
    faults += caches.unmeasured(sums.conversion, sums.caches) if besides else ()
    conversion = tuple(_conversion(sums, task))
    measured = [(edge, task.output, own) for edge, own in sums.conversion.items()]
    measured += [(edge, name, own) for (edge, name), own in sums.caches.items() if own.positions]
    ended = {name: outcome for name, outcome in ran.corners.items() if _ok(ran, name)}
    texts = {name: texts_of(outcome, workload) for name, outcome in ended.items()}
    responses = {name: responses_of(outcome, workload) for name, outcome in ended.items()}
    parted = tuple(partings(responses, workload, sums.behaviour))
    answers = {
        name: logprobs_of(workload.answers, outcome.continuations())
        for name, outcome in ended.items()
    }
    effects = tuple(observe(texts, workload, sums.behaviour, answers))
    return Evidence(
        corners={name: _corner(name, outcome, workload) for name, outcome in ran.corners.items()},
        conversion=conversion,
        interaction=tuple(sums.interaction.of_sets(task.output)),
        stimuli=tuple(sums.interaction.of_stimuli()),
        effects=tuple(observed.effect() for observed in effects),
        drift=tuple(drifts(sums.behaviour)),
        divergence=tuple(sums.behaviour.rows()),
        partings=tuple(own.row() for own in parted),
        intervals=tuple(intervals(sums.behaviour, parted, effects, workload.confidences)),
        faults=tuple(faults),
        compared=sum(own.positions for own in sums.conversion.values()),
        covered_rows=_covered_rows(ran, workload),
        layers=tuple(layer_errors(ran, workload.batches, task.output)),
        shapes=profiles.shapes(measured),
        tolerances=profiles.tolerances(measured),
    )


def _corner(name: str, outcome: Outcome, workload: Workload) -> Corner:
    runtime = "PyTorch" if name.startswith("T") else "ONNX Runtime"
    model = "original" if name.endswith("o") else "edited"
    batches = len(workload.batches) if outcome.status == "ok" else 0
    return Corner(
        runtime,
        model,
        outcome.status,
        outcome.seconds,
        outcome.peak_bytes,
        batches,
        outcome.detail,
    )


# ----------------------------------------------------------------------------------- interface


def _interface_faults(ran: Ran, workload: Workload, task: Task) -> Iterator[Finding]:
    """Missing outputs, other shapes and dtypes, NaN: each named once, at its first batch."""
    found: dict[tuple[str, str, str], tuple[Finding, int]] = {}
    for batch in workload.batches:
        for fault in _batch_faults(ran, batch, task):
            corner, output = fault.site.split("/")[:2]
            key = (fault.symptom, corner, output)
            first, count = found.get(key, (fault, 0))
            found[key] = (first, count + 1)
    for fault, count in found.values():
        more = f" and {count - 1} more batches" if count > 1 else ""
        message = fault.message + more
        yield Finding(fault.stage, fault.symptom, fault.site, message, fault.value, fault.limit)
    yield from _generation_faults(ran)
    yield from noise.faults(ran)


def _generation_faults(ran: Ran) -> Iterator[Finding]:
    for name in ran.corners:
        made = ran.corners[name].generations() if _ok(ran, name) else ()
        stopped = sum(generated.nonfinite for generated in made)
        if stopped:
            message = f"{name}: {stopped} greedy responses stopped at logits that are not finite"
            yield Finding("run", "nan", f"{name}/generation", message, float(stopped), 0.0)


def _batch_faults(ran: Ran, batch: Batch, task: Task) -> Iterator[Finding]:
    for torch_corner, onnx_corner in EDGES.values():
        names = [name for name in (torch_corner, onnx_corner) if _ok(ran, name)]
        for name in names:
            yield from _corner_faults(name, ran.corners[name], batch, task)
        if len(names) == 2:
            yield from _pair_faults(ran, torch_corner, onnx_corner, batch, task)


def _corner_faults(name: str, outcome: Outcome, batch: Batch, task: Task) -> Iterator[Finding]:
    facts = outcome.facts(batch.name)
    if facts.problem:
        named = {fact.name for fact in facts.outputs}
        symptom = "shape" if task.output in named else "missing output"
        site = f"{name}/{task.output}/{batch.name}"
        yield Finding("interface", symptom, site, f"{name}: {facts.problem} on {quote(batch.name)}")
    for fact in facts.outputs:
        if fact.nonfinite:
            site = f"{name}/{fact.name}/{batch.name}"
            message = (
                f"{name}: {fact.nonfinite} values of {quote(fact.name)} are not finite at real "
                f"positions of {quote(batch.name)}"
            )
            yield Finding("run", "nan", site, message, float(fact.nonfinite), 0.0)


def _pair_faults(
    ran: Ran, torch_corner: str, onnx_corner: str, batch: Batch, task: Task
) -> Iterator[Finding]:
    """Every output PyTorch has is there in ONNX Runtime, with its shape and dtype."""
    theirs = {fact.name: fact for fact in ran.corners[onnx_corner].facts(batch.name).outputs}
    judged = bool(ran.corners[onnx_corner].facts(batch.name).problem)
    for ours in ran.corners[torch_corner].facts(batch.name).outputs:
        if ours.name == task.output and judged:
            continue  # `_corner_faults` has said so
        found = _differences(ours, theirs.pop(ours.name, None), ran.dtype(torch_corner))
        for symptom, problem in found:
            site = f"{onnx_corner}/{ours.name}/{batch.name}"
            message = f"{onnx_corner}: {problem} on {quote(batch.name)}"
            yield Finding("interface", symptom, site, message)
    yield from caches.unknown(onnx_corner, theirs, batch.name)


def _differences(
    ours: OutputFact, theirs: OutputFact | None, computed: str
) -> Iterator[tuple[str, str]]:
    """Symptom and words. What a graph computes in another type than PyTorch's it may return so."""
    name = ours.name
    if theirs is None:
        yield "missing output", f"has no output {name}, which PyTorch has"
        return
    if theirs.shape != ours.shape:
        found, expected = list(theirs.shape), list(ours.shape)
        yield "shape", f"{name} has shape {found}, in PyTorch {expected}"
    if theirs.dtype not in (ours.dtype, computed):
        yield "dtype", f"{name} is {theirs.dtype}, in PyTorch it is {ours.dtype}"
    if theirs.padded and not theirs.nonfinite and not ours.padded:
        yield "nan", f"{theirs.padded} values of {name} are not finite under padding"


# ----------------------------------------------------------------------------------- embedding


def _embedding_faults(ran: Ran, workload: Workload) -> Iterator[Finding]:
    """Compares every row of the embedding at the graph cut right after it."""
    for torch_corner, onnx_corner in EDGES.values():
        if not (_ok(ran, torch_corner) and _ok(ran, onnx_corner)):
            continue
        for name in (torch_corner, onnx_corner):
            problem = ran.corners[name].embedding_problem
            if problem:
                message = f"{name}: the embedding rows were not compared: {problem}"
                yield Finding("coverage", "embedding not compared", name, message)
        yield from _row_faults(ran, torch_corner, onnx_corner)


def _row_faults(ran: Ran, torch_corner: str, onnx_corner: str) -> Iterator[Finding]:
    rows = [ran.corners[name] for name in (torch_corner, onnx_corner)]
    if any(outcome.embedding_problem for outcome in rows):
        return
    ours, theirs = (outcome.embedding() for outcome in rows)
    if ours.shape != theirs.shape:
        message = f"{onnx_corner}: embedding {theirs.shape}, in PyTorch {ours.shape}"
        yield Finding("embedding", "shape", onnx_corner, message)
        return
    wrong, worst = _wrong_rows(ours, theirs, UNITS[ran.dtype(torch_corner)])
    if len(wrong):
        listed = ", ".join(map(str, wrong[:5])) + (", …" if len(wrong) > 5 else "")
        message = (
            f"{onnx_corner}: {len(wrong)} of {len(ours)} embedding rows differ from PyTorch's, "
            f"tokens {listed}; largest difference {worst:.3g}"
        )
        site = f"{onnx_corner}/token {wrong[0]}"
        yield Finding("embedding", "wrong value", site, message, worst, 0.0)


def _wrong_rows(
    ours: NDArray[Any], theirs: NDArray[Any], unit: float
) -> tuple[NDArray[np.int64], float]:
    """Rows that differ by more than rounding, and the largest difference; NaN differs. `unit` is
    the unit roundoff of what the graph computes in."""
    wrong: list[int] = []
    worst = 0.0
    for begin in range(0, len(ours), 4096):
        a = np.asarray(ours[begin : begin + 4096], np.float64)
        b = np.asarray(theirs[begin : begin + 4096], np.float64)
        difference = np.abs(a - b).max(axis=1)
        allowed = 2 * unit * np.abs(a).max(axis=1)
        bad = np.flatnonzero(~(difference <= allowed))
        wrong += (bad + begin).tolist()
        worst = float(np.max([worst, *difference[bad]]))
    return np.array(wrong, np.int64), worst


def _covered_rows(ran: Ran, workload: Workload) -> int:
    onnx = [name for name in ("R_o", "R_e") if name in ran.corners]
    covered = all(_ok(ran, n) and not ran.corners[n].embedding_problem for n in onnx)
    return workload.vocab if covered and onnx else 0


# --------------------------------------------------------------------------------------- sums


def _ok(ran: Ran, name: str) -> bool:
    return name in ran.corners and ran.corners[name].status == "ok"


def _kept(ran: Ran, batch: Batch, names: tuple[str, ...] = CORNERS) -> Kept:
    """What each corner kept of a batch, leaving out corners that have nothing."""
    kept = {}
    for name in names:
        if _ok(ran, name) and not ran.corners[name].facts(batch.name).problem:
            kept[name] = ran.corners[name].outputs(batch.name)
    return kept


def _add_batch(sums: Sums, ran: Ran, batch: Batch, task: Task) -> None:
    kept, references = _kept(ran, batch), noise.whole(ran.references, batch)
    narrow = noise.whole(ran.narrow, batch)
    where = [f"{batch.rows[row]} @ {column}" for row, column in batch.selected]
    with np.errstate(invalid="ignore", over="ignore"):
        for edge, (t, r) in EDGES.items():
            if noise.comparable(ran, (t, r), kept, references, narrow):
                own = sums.conversion.setdefault(edge, ConversionSums(ran.dtype(t)))
                own.add(where, kept[t], references[t], kept[r], narrow.get(t))
                if task.cache or task.pooled:
                    outcomes = [ran.corners[t], ran.references[t], ran.corners[r]]
                    outcomes += [ran.narrow[t]] if t in ran.narrow else []
                    caches.add(sums.caches, edge, batch.name, where, outcomes, ran.dtype(t))
        sums.interaction.add(batch, kept, references, narrow, noise.coarsest(ran))
        if task.causal:
            sums.behaviour.add(batch, kept, references, _dtypes(ran, batch, task))


def _dtypes(ran: Ran, batch: Batch, task: Task) -> dict[str, str]:
    """The dtype of each corner's own output, before it is kept as float32."""
    return {
        name: fact.dtype
        for name in CORNERS
        if _ok(ran, name)
        for fact in ran.corners[name].facts(batch.name).outputs
        if fact.name == task.output
    }


# ------------------------------------------------------------------------------------- results


def _conversion(sums: Sums, task: Task) -> Iterator[Conversion]:
    for edge, own in sums.conversion.items():
        yield _conversion_row(edge, task.output, own, *sums.behaviour.over_sets(edge))
    for edge, output, own in caches.worst(sums.caches):
        yield _conversion_row(edge, output, own, None, None)


def _conversion_row(
    edge: str, output: str, own: ConversionSums, kl: float | None, flips: int | None
) -> Conversion:
    return Conversion(
        edge=edge,
        output=output,
        positions=own.positions,
        elements=own.difference.count,
        max_abs=own.difference.largest,
        mean_abs=own.difference.mean,
        max_rel=own.relative.largest,
        mean_rel=own.relative.mean,
        cosine=own.cosine,
        kl=kl,
        flips=flips,
        noise_max=own.noise_max,
        noise_l2=own.noise_l2,
        ratio_max=own.ratio_max,
        ratio_l2=own.ratio_l2,
        ratio_position=own.ratio_position,
        worst=own.worst[1],
    )
