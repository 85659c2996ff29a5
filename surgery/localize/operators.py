"""Down to the operator: the node of a guilty segment that a fresh graph of ours does otherwise.

Values are matched by their numbers, since foreign graphs share no names with ours. A node that
reads what our graph knows and gives what it does not is suspected; it is at fault if the boundary
comes out right once the value that our graph has instead is put in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from surgery.arch import Architecture
from surgery.errors import SurgeryError, quote
from surgery.export import export_graph, onnxfile
from surgery.export.lineage import Lineage
from surgery.export.lineage.diagnosis import MISSING
from surgery.localize.boundaries import Boundary, find_boundaries, output_of, owners_of
from surgery.localize.runs import Runs
from surgery.localize.segments import (
    Segment,
    constant_difference,
    constants,
    difference,
    likest,
    operands,
    unmatched,
)
from surgery.runtimes.segments import segment

Array = NDArray[Any]

CLOSENESS = (2e-6, 1e-4)
"""Two values are the same if they differ by this much of the larger one at most: first by little
more than rounding, then by what other operators for the same thing may differ."""
TRIALS, TWINS = 48, 4
"""How many values are tried for one boundary, and how many in the place of one."""


@dataclass(frozen=True)
class Operator:
    """A node of the graph: its name, its kind, what it reads and the value it makes.

    `reason` says how it differs from a fresh graph's, `constant` which initializer does, and
    `tensors` which of the checkpoint's its weights should be and are not. `confirmed`: with a
    fresh graph's value in its place the boundary is right.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    value: str
    reason: str = ""
    constant: str = ""
    tensors: tuple[str, ...] = ()
    confirmed: bool = False

    def __str__(self) -> str:
        node = f"{self.kind} {quote(self.name or self.value)}"
        if self.tensors:
            return f"{node}, whose weight is not {', '.join(map(quote, self.tensors))}"
        return f"{node}, {self.reason}" if self.reason else node

    @property
    def told(self) -> str:
        """The kind and how it differs, without a name; nothing where it is but suspected."""
        if not (self.confirmed or self.tensors):
            return ""
        return str(self).replace(f" {quote(self.name or self.value)}", "", 1)

    @classmethod
    def of(cls, node: Any, value: str, **told: Any) -> Operator:
        return cls(node.name, node.op_type, tuple(node.input), value, **told)


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
        found = None if ours is None else self._search(boundary, theirs, ours, right)
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
        values |= {name: array for name, array in given.items() if name in read and name != value}
        if path is None:
            return Segment.of(nodes, values, constants(model, self._runs.pair.data, self._weights))
        tensors = self._arch.roles
        return Segment.of(nodes, values, constants(model, self._runs.pair.model, tensors))

    def _search(
        self, boundary: Boundary, theirs: Segment, ours: Segment, right: Callable[[Array], bool]
    ) -> Operator | None:
        first = None
        for closeness in CLOSENESS:
            pairs = _suspects(boundary, theirs, ours, closeness)
            for node, value, twin, array in islice(pairs, TRIALS):
                first = first or Operator.of(node, value)
                constant = self._constant(boundary, theirs, node, value, ours, twin, right)
                if constant is not None:
                    return constant
                if self._heals(boundary, value, array, right):
                    found = self._descend(boundary, theirs, node, value, ours, twin, right)
                    return replace(found, confirmed=True)
        return first

    def _constant(
        self,
        boundary: Boundary,
        theirs: Segment,
        node: Any,
        value: str,
        ours: Segment,
        twin: Any,
        right: Callable[[Array], bool],
    ) -> Operator | None:
        """The node, if it reads a constant with which it is wrong, here or wherever else that is
        read, and right with that of its twin."""
        reason, name = constant_difference(theirs, node, ours, twin, CLOSENESS[0])
        pairs = dict(operands(theirs, node, ours, twin, CLOSENESS[0]))
        expected = ours.value(pairs[name]) if name else None
        if expected is None or expected.size != theirs.constants[name].size:
            return None
        array = expected.reshape(theirs.constants[name].shape)
        if not self._heals(boundary, name, array, right):
            return None
        return Operator.of(node, value, reason=reason, constant=name, confirmed=True)

    def _heals(
        self, boundary: Boundary, value: str, array: Array, right: Callable[[Array], bool]
    ) -> bool:
        """Whether the boundary is right with `array` in place of one value before it."""
        if value == boundary.value:
            return right(array)
        try:
            given = {**self._given, value: array}
            return right(self._runs.onnx([boundary.value], given, optimised=False)[boundary.value])
        except SurgeryError:
            return False  # a value of another shape or type, which the graph cannot take

    def _descend(
        self,
        boundary: Boundary,
        theirs: Segment,
        node: Any,
        value: str,
        ours: Segment,
        twin: Any,
        right: Callable[[Array], bool],
    ) -> Operator:
        """From a node whose operands differ to the one that makes the operand: where a node does
        nothing at all, what it gives is known, and the next one is suspected in its place."""
        differing = operands(theirs, node, ours, twin, CLOSENESS[0])
        for mine, other in differing:
            maker, known = theirs.maker(mine), ours.value(other)
            if mine in theirs.constants or maker is None or known is None:
                continue
            array = known.reshape(theirs.values[mine].shape)
            if len(differing) == 1 and self._heals(boundary, mine, array, right):
                twin = ours.maker(other)
                if twin is None:
                    return Operator.of(maker, mine)
                return self._descend(boundary, theirs, maker, mine, ours, twin, right)
        for near, its, other in _upwards(node, value, theirs, twin, ours):
            told = difference if near is node else constant_difference
            reason, constant = told(theirs, near, ours, other, CLOSENESS[0])
            if reason:
                return Operator.of(near, its, reason=reason, constant=constant)
        return Operator.of(node, value)


def _upwards(
    node: Any, value: str, theirs: Segment, twin: Any, ours: Segment
) -> Iterator[tuple[Any, str, Any]]:
    """A node with its twin, then those before it, as far as the two go the same way: a constant
    may be so little off that it shows only later."""
    queue, seen = [(node, value, twin)], {value}
    for near, its, like in queue:
        yield near, its, like
        if near.op_type == like.op_type and len(near.input) == len(like.input):
            for mine, other in zip(near.input, like.input, strict=True):
                makers = theirs.maker(mine), ours.maker(other)
                if None not in makers and mine not in seen:
                    seen.add(mine)
                    queue.append((makers[0], mine, makers[1]))


def _suspects(
    boundary: Boundary, theirs: Segment, ours: Segment, closeness: float
) -> Iterator[tuple[Any, str, Any, Array]]:
    """Nodes that give what our graph does not know, each with those of ours that may be its twin
    and their values; what makes the boundary itself last."""
    unknown = unmatched(theirs, ours, closeness)
    for node, name in unknown:
        if name != boundary.value:
            mine = theirs.values[name]
            for twin, other in likest(mine, node.op_type, ours)[:TWINS]:
                yield node, name, twin, ours.values[other].reshape(mine.shape)
    node, last = theirs.maker(boundary.value), ours.nodes[-1]
    strange = {name for _, name in unknown}
    if strange.isdisjoint(node.input):
        yield node, boundary.value, last, ours.values[last.output[0]]


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
