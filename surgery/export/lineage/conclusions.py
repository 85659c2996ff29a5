"""What follows from all initializers together: swaps, leftovers, tensors that none holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from surgery.errors import describe, quote
from surgery.export.expressions import Tensor
from surgery.export.lineage import diagnosis
from surgery.export.lineage.expected import fits
from surgery.export.lineage.result import MISMATCH, UNMATCHED, Fault, Lineage, Row
from surgery.export.lineage.stored import Stored
from surgery.export.lineage.tracer import Traced, Tracer
from surgery.export.lineage.unused import NOT_HELD, reason


@dataclass(frozen=True)
class Graph:
    """What is looked at: the graph's file, the checkpoint, its outputs, its initializers."""

    onnx: str
    model: str
    outputs: tuple[str, ...]
    initializers: Mapping[str, Stored]


def conclude(tracer: Tracer, graph: Graph, traced: Sequence[Traced]) -> Lineage:
    """The result for all initializers, in order."""
    rows = [item.row for item in traced]
    held = {tensor for row in rows for tensor in row.tensors}
    unused = {
        name: reason(name, tracer.checkpoint, tracer.arch, graph.outputs)
        for name in tracer.checkpoint.tensors
        if name not in held
    }
    missing = [name for name, why in unused.items() if why is None]
    pairs = _leftovers(tracer, graph, rows, missing)
    rows = [_paired_row(row, pairs) for row in rows]
    findings = [*_swaps(traced), *(_paired(name, tensor) for name, tensor in pairs.items())]
    findings += [
        _missing(tracer, graph, rows, name) for name in missing if name not in pairs.values()
    ]
    reasons = {name: why or NOT_HELD for name, why in unused.items() if name not in pairs.values()}
    return Lineage(graph.onnx, graph.model, tuple(rows), reasons, tuple(findings))


def _swaps(traced: Sequence[Traced]) -> list[Fault]:
    """The faults of all initializers; two that hold each other's tensor are swapped."""
    holds = {item.row.tensors[0]: item.holds for item in traced if item.holds}
    found = []
    for item in traced:
        for fault in item.faults:
            mutual = item.holds and holds.get(item.holds) == fault.tensor
            swapped = bool(mutual) and fault.symptom == diagnosis.WRONG
            found.append(replace(fault, symptom=diagnosis.SWAPPED) if swapped else fault)
    return found


def _leftovers(
    tracer: Tracer, graph: Graph, rows: Sequence[Row], missing: Sequence[str]
) -> dict[str, str]:
    """Unmatched initializers and missing tensors that only fit each other."""
    fitting = {name: _fitting(tracer, graph, rows, name) for name in missing}
    counts: dict[str, int] = {}
    for names in fitting.values():
        for name in names:
            counts[name] = counts.get(name, 0) + 1
    return {
        names[0]: tensor
        for tensor, names in fitting.items()
        if len(names) == 1 and counts[names[0]] == 1
    }


def _fitting(tracer: Tracer, graph: Graph, rows: Sequence[Row], tensor: str) -> list[str]:
    """The unmatched initializers that have the shape of a tensor, in either orientation."""
    shape = tracer.checkpoint.info(tensor).shape
    unmatched = [row.name for row in rows if row.status == UNMATCHED]
    return [
        name
        for name in unmatched
        if name in graph.initializers and fits(graph.initializers[name].shape, shape)
    ]


def _paired_row(row: Row, pairs: Mapping[str, str]) -> Row:
    return Row.of(row.name, MISMATCH, Tensor(pairs[row.name])) if row.name in pairs else row


def _paired(initializer: str, tensor: str) -> Fault:
    message = (
        f"tensor {quote(tensor, 200)}: {NOT_HELD}, and the model needs it; initializer "
        f"{quote(initializer, 200)} is the only other one of its shape, with other contents"
    )
    return Fault(diagnosis.MISSING, initializer, tensor, message)


def _missing(tracer: Tracer, graph: Graph, rows: Sequence[Row], tensor: str) -> Fault:
    fitting = _fitting(tracer, graph, rows, tensor)
    listed = f"; of its shape and unmatched: {describe(fitting)}" if fitting else ""
    message = f"tensor {quote(tensor, 200)}: {NOT_HELD}, and the model needs it{listed}"
    return Fault(diagnosis.MISSING, None, tensor, message)
