"""Every initializer of a graph traced, as many at a time as there are cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from surgery.arch import identify
from surgery.arch.interface import Architecture
from surgery.checkpoint import Checkpoint
from surgery.checkpoint.parallel import Advance, Progress, in_parallel
from surgery.errors import ArchitectureError, CheckpointError
from surgery.export import onnxfile
from surgery.export.expressions import Expression, Tensor
from surgery.export.lineage.catalogue import Catalogue
from surgery.export.lineage.claims import read_claims
from surgery.export.lineage.conclusions import Graph, conclude
from surgery.export.lineage.expected import Expectations
from surgery.export.lineage.forms import forms
from surgery.export.lineage.linked import Shards
from surgery.export.lineage.packing import trace_packed
from surgery.export.lineage.quantised import Packed, packed
from surgery.export.lineage.result import UNMATCHED, Lineage, Row
from surgery.export.lineage.sampling import Sampler
from surgery.export.lineage.stored import Stored, stored_initializer, stored_tensor
from surgery.export.lineage.tracer import Traced, Tracer
from surgery.export.lineage.uses import uses


def trace_whole(
    onnx: Path, model: Path, progress: Progress | None, initializers: Path | None
) -> Lineage:
    """What every initializer is; see `surgery.export.lineage.trace`, which also checks the file."""
    graph = onnxfile.read(onnx, initializers).graph
    checkpoint = Checkpoint.open(model)
    tracer = _tracer(checkpoint, graph, read_claims(onnx, checkpoint))
    folder = initializers or onnx.parent
    found = {t.name: stored_initializer(t, folder) for t in graph.initializer}
    readable = {name: stored for name, stored in found.items() if stored is not None}
    traced = _trace_all(tracer, readable, progress)
    rest = {name: Traced(Row(name, UNMATCHED)) for name in found if name not in traced}
    rows = [{**traced, **rest}[name] for name in found]
    outputs = tuple(value.name for value in graph.output)
    return conclude(tracer, Graph(onnx.name, str(model), outputs, readable), rows)


def _tracer(checkpoint: Checkpoint, graph: Any, claims: Mapping[str, Expression]) -> Tracer:
    arch = _arch(checkpoint)
    stored = dict(_readable(checkpoint))
    sampler = Sampler(stored)
    known: list[Expression] = [Tensor(name) for name in stored if stored[name].is_float]
    derived = [*known, *(forms(arch) if arch else ())]
    expected = Expectations(checkpoint, arch, sampler, uses(graph), claims)
    return Tracer(checkpoint, arch, Catalogue(sampler, derived), expected, Shards.of(checkpoint))


def _arch(checkpoint: Checkpoint) -> Architecture | None:
    """What is known of the family, if it is known: contents can be compared without."""
    try:
        return identify(checkpoint)
    except ArchitectureError:
        return None


def _readable(checkpoint: Checkpoint) -> Iterator[tuple[str, Stored]]:
    """The tensors whose dtype numpy has, where they lie."""
    for name in checkpoint.tensors:
        with suppress(CheckpointError):
            yield name, stored_tensor(checkpoint, name)


def _trace_all(
    tracer: Tracer, stored: Mapping[str, Stored], progress: Progress | None
) -> dict[str, Traced]:
    """Every initializer, the largest first, as many at a time as there are cores."""
    jobs: dict[str, Callable[[Advance], list[Traced]]] = {}
    groups = {name: weight for weight in packed(stored) for name in weight.names}
    for name, array in sorted(stored.items(), key=lambda item: -item[1].nbytes):
        weight = groups.get(name)
        if weight is None:
            jobs[name] = partial(_trace_one, tracer, array)
        elif name == weight.values.name:
            jobs[name] = partial(_trace_weight, tracer, weight)
    done = in_parallel(jobs, sum(array.nbytes for array in stored.values()), progress)
    return {traced.row.name: traced for found in done.values() for traced in found}


def _trace_one(tracer: Tracer, stored: Stored, advance: Advance) -> list[Traced]:
    traced = tracer.trace(stored)
    advance(stored.nbytes)
    return [traced]


def _trace_weight(tracer: Tracer, weight: Packed, advance: Advance) -> list[Traced]:
    traced = trace_packed(tracer, weight)
    advance(weight.values.nbytes)
    return traced
