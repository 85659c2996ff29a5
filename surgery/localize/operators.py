"""Down to the operator: the node of a guilty segment that a fresh graph of ours does otherwise.

Values are matched by their numbers, since foreign graphs share no names with ours. A node that
reads what our graph knows and gives what it does not is suspected; it is at fault if the boundary
comes out right once the value that our graph has instead is put in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from surgery.arch import Architecture
from surgery.errors import SurgeryError
from surgery.export import export_graph, onnxfile
from surgery.export.lineage import Lineage
from surgery.export.lineage.diagnosis import MISSING
from surgery.localize.boundaries import Boundary, find_boundaries, output_of, owners_of
from surgery.localize.runs import Runs
from surgery.localize.segments import Segment, constants
from surgery.localize.trial import Heals, Operator, Trial
from surgery.runtimes.segments import segment

Array = NDArray[Any]


class Operators:
    """Finds operators at fault in one graph, `given` PyTorch's values at its boundaries."""

    def __init__(
        self,
        runs: Runs,
        arch: Architecture,
        model: Any,
        boundaries: tuple[Boundary, ...],
        given: Mapping[str, Array],
        lineage: Lineage,
    ) -> None:
        self._runs, self._arch, self._model = runs, arch, model
        self._given, self._wrong = given, _wrong_weights(lineage)
        self._weights = {row.name for row in lineage.rows if row.tensors}
        self._sites = {b.value: b.site for b in boundaries}
        self._own: tuple[Path, Any, dict[str, Boundary]] | None = None

    def find(self, boundary: Boundary, right: Callable[[Array], bool]) -> Operator | None:
        """The operator at fault before `boundary`, whose value is `right` or not. None where
        nothing tells, or no graph of ours can be made to compare."""
        try:
            ours = self._fresh(boundary)
            theirs = self._segment(self._model, boundary.value, self._given, None)
        except SurgeryError:
            ours = None
        heals = self._heals(boundary, right)
        found = None if ours is None else Trial(boundary.value, theirs, ours, heals).operator()
        return self._weighed(found, boundary)

    def _weighed(self, found: Operator | None, boundary: Boundary) -> Operator | None:
        """With the tensors that its weights should be, where lineage says they are not; where
        nothing else tells, the node that reads such a weight."""
        nodes = segment(self._model, [boundary.value], set(self._given))
        reading = list(_readers(nodes, self._model, self._wrong))
        for node, tensors in reading:
            if found is None or found.value in node.output:
                confirmed = found is not None and found.confirmed
                return Operator.of(node, node.output[0], tensors=tensors, confirmed=confirmed)
        return found

    def _fresh(self, boundary: Boundary) -> Segment | None:
        """The same segment of a fresh graph; None where that has no such boundary."""
        path, own, ours = self._own or self._export()
        self._own = path, own, ours
        if boundary.site not in ours:
            return None
        named = {self._sites.get(value): array for value, array in self._given.items()}
        given = {ours[site].value: array for site, array in named.items() if site in ours}
        return self._segment(own, ours[boundary.site].value, given, path)

    def _export(self) -> tuple[Path, Any, dict[str, Boundary]]:
        path, checkpoint = self._runs.scratch / "own.onnx", self._runs.pair.model
        export_graph(checkpoint, path, task=self._runs.task.name)
        own = onnxfile.read(path, checkpoint)
        names = ((tensor.name, [tensor.name]) for tensor in own.graph.initializer)
        found = find_boundaries(own.graph, owners_of(names, self._arch), self._arch)
        return path, own, {b.site: b for b in (output_of(self._runs.task.output), *found)}

    def _segment(
        self, model: Any, value: str, given: Mapping[str, Array], path: Path | None
    ) -> Segment:
        nodes = segment(model, [value], set(given))
        results = [name for node in nodes for name in node.output if name]
        found = self._runs.onnx(results, given, graph=path, optimised=False)
        read = {name for node in nodes for name in node.input}
        values = {name: found[name] for name in results if name in found}
        inputs = {**self._runs.batch.inputs(), **given}
        values |= {name: array for name, array in inputs.items() if name in read and name != value}
        if path is None:
            return Segment.of(nodes, values, constants(model, self._runs.pair.data, self._weights))
        tensors = self._arch.roles
        return Segment.of(nodes, values, constants(model, self._runs.pair.model, tensors))

    def _heals(self, boundary: Boundary, right: Callable[[Array], bool]) -> Heals:
        """Says whether the boundary is right with an array in place of one value before it."""

        def heals(value: str, array: Array) -> bool:
            if value == boundary.value:
                return right(array)
            try:
                given = {**self._given, value: array}
                found = self._runs.onnx([boundary.value], given, optimised=False)
            except SurgeryError:
                return False  # a value of another shape or type, which the graph cannot take
            return right(found[boundary.value])

        return heals


def _readers(
    nodes: Iterable[Any], model: Any, wrong: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """The nodes that read an initializer that is wrong, or what is made of such alone, each with
    the tensors it should be."""
    made = dict(wrong)
    fixed = {tensor.name for tensor in model.graph.initializer}
    for node in nodes:
        tensors = tuple(dict.fromkeys(t for name in node.input for t in made.get(name, ())))
        if all(name in fixed for name in node.input if name):
            fixed |= set(node.output)
            made |= dict.fromkeys(node.output, tensors) if tensors else {}
        if tensors:
            yield node, tensors


def _wrong_weights(lineage: Lineage) -> dict[str, tuple[str, ...]]:
    """Initializer to the tensor that it should be and is not."""
    return {
        fault.initializer: (fault.tensor,)
        for fault in lineage.findings
        if fault.symptom != MISSING and fault.initializer and fault.tensor
    }
