"""Down to the operator: the first node of a guilty segment that our own graph has no match for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.arch import Architecture
from surgery.errors import quote
from surgery.export import export_graph, onnxfile
from surgery.localize.boundaries import Boundary, find_boundaries, owners_of
from surgery.localize.graphs import segment
from surgery.localize.runs import Arrays, Runs

MATCH = 1e-4
"""Two interior values are the same if they differ by this much of the larger one at most."""


@dataclass(frozen=True)
class Operator:
    """A node of the graph: its name, its kind, what it reads and the value it makes."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    value: str

    def __str__(self) -> str:
        return f"{self.kind} {quote(self.name or self.value)}"


def find_operator(
    runs: Runs,
    model: Any,
    boundary: Boundary,
    given: Mapping[str, NDArray[Any]],
    arch: Architecture,
) -> Operator | None:
    """The first node before `boundary` whose result is none of those that a fresh graph of the
    same checkpoint has in the same segment, though what it reads is. None where that graph has no
    such boundary, or nothing tells."""
    graph = runs.scratch / "own.onnx"
    if not graph.exists():
        export_graph(runs.pair.model, graph, task=runs.task.name)
    own = onnxfile.read(graph, runs.pair.model)
    ours = {b.site: b for b in find_boundaries(own.graph, _names(own, arch), arch)}
    if boundary.site not in ours:
        return None
    theirs = segment(model, boundary.value, set(given))
    found = runs.onnx(_results(theirs), given, optimised=False)
    sites = {b.value: b.site for b in find_boundaries(model.graph, _names(model, arch), arch)}
    mine = {ours[s].value: array for v, array in given.items() if (s := sites.get(v)) in ours}
    nodes = segment(own, ours[boundary.site].value, set(mine))
    known = runs.onnx(_results(nodes), mine, graph=graph, optimised=False)
    return _first_unknown(theirs, found, list(known.values()))


def _names(model: Any, arch: Architecture) -> dict[str, Any]:
    return owners_of(((t.name, [t.name]) for t in model.graph.initializer), arch)


def _results(nodes: list[Any]) -> list[str]:
    return [name for node in nodes for name in node.output if name]


def _first_unknown(nodes: list[Any], found: Arrays, known: list[NDArray[Any]]) -> Operator | None:
    for node in nodes:
        for name in node.output:
            array = found.get(name)
            if array is not None and not any(_same(array, other) for other in known):
                return Operator(node.name, node.op_type, tuple(node.input), name)
    return None


def _same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    if a.size != b.size or a.dtype.kind != b.dtype.kind:
        return False
    left, right = a.reshape(-1), b.reshape(-1)
    if a.dtype.kind != "f":
        return bool((left == right).all())
    scale = float(np.abs(right[np.isfinite(right)]).max(initial=0.0))
    return bool(np.isclose(left, right, rtol=0, atol=MATCH * scale, equal_nan=True).all())
