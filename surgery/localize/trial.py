"""Which node of a segment is at fault: values put right one by one until the end is right.

A node is suspected that gives what a fresh graph of ours does not know. It stands beside a twin of
that graph, and what the twin has is put in place of what it gives, or of what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from numpy.typing import NDArray

from surgery.errors import quote
from surgery.localize.segments import (
    Segment,
    constant_difference,
    difference,
    likest,
    operands,
    same,
    unmatched,
)

Array = NDArray[Any]
Heals = Callable[[str, Array], bool]
"""Whether the boundary is right once an array is put in place of the named value, for all that
read it."""

CLOSENESS = (2e-6, 1e-4)
"""Two values are the same if they differ by this much of the larger one at most: first by little
more than rounding, then by what other operators for the same thing may differ."""
_IDLE = ("Expand", "Identity", "Reshape", "Squeeze", "Unsqueeze")
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


@dataclass(frozen=True)
class Twins:
    """A node with one value it makes, and the node of a fresh graph that may do its work, None
    where it has none, with the name of that one's value."""

    node: Any
    value: str
    twin: Any
    known: str

    def operands(self) -> list[tuple[str, str]]:
        """What both read, in pairs; none where the two do not compare."""
        alike = self.twin is not None and self.node.op_type == self.twin.op_type
        if not alike or len(self.node.input) != len(self.twin.input):
            return []
        return list(zip(self.node.input, self.twin.input, strict=True))


class Trial:
    """The search in one segment: `theirs`, which makes the boundary `value`, beside `ours`."""

    def __init__(self, value: str, theirs: Segment, ours: Segment, heals: Heals) -> None:
        self._value, self._theirs, self._ours, self._heals = value, theirs, ours, heals
        self._strange: set[str] = set()

    def operator(self) -> Operator | None:
        """The node at fault; the first suspect, unconfirmed, where no right value helps."""
        first = None
        for closeness in CLOSENESS:
            for twins in islice(self._suspects(closeness), TRIALS):
                first = first or Operator.of(twins.node, twins.value)
                found = self._constant(twins) or self._result(twins) or self._operand(twins)
                if found is not None:
                    return replace(found, confirmed=True)
        return first

    def _suspects(self, closeness: float) -> Iterator[Twins]:
        """Nodes that give what our graph does not know, each with those of ours that may be its
        twin; what makes the boundary itself last."""
        unknown = unmatched(self._theirs, self._ours, closeness)
        for node, name in unknown:
            if name != self._value:
                alike = likest(node, name, self._theirs, self._ours)
                for twin, other in alike[:TWINS]:
                    yield Twins(node, name, twin, other)
        self._strange = {name for _, name in unknown}
        node, last = self._theirs.maker(self._value), self._ours.nodes[-1]
        yield Twins(node, self._value, last, last.output[0])

    def _constant(self, twins: Twins) -> Operator | None:
        """The node, if it reads a constant with which it is wrong, here or wherever else that is
        read, and right with that of its twin."""
        reason, name = self._told(constant_difference, twins)
        if name and self._heals_with(name, dict(self._differing(twins))[name]):
            return Operator.of(twins.node, twins.value, reason=reason, constant=name)
        return None

    def _result(self, twins: Twins) -> Operator | None:
        """The node, or one before it, if what its twin gives heals: that of the boundary itself
        does so always, which says nothing where what it reads is unknown."""
        if twins.value == self._value and not self._strange.isdisjoint(twins.node.input):
            return None
        return self._descend(twins) if self._heals_with(twins.value, twins.known) else None

    def _operand(self, twins: Twins) -> Operator | None:
        """What makes the one operand in which a node and its twin differ, if that heals: others
        may read it too, so that putting this node right is not enough."""
        before = self._before(twins)
        return self._descend(before) if before is not None else None

    def _descend(self, twins: Twins) -> Operator:
        """From a node whose operand differs to the one that makes the operand: where a node does
        nothing at all, what it gives is known, and the next one is suspected in its place."""
        twins = self._past_idle(twins)
        before = self._before(twins)
        if before is not None:
            return self._descend(before)
        for near in self._upwards(twins) if twins.twin is not None else ():
            told = difference if near.node is twins.node else constant_difference
            reason, constant = self._told(told, near)
            if reason:
                return Operator.of(near.node, near.value, reason=reason, constant=constant)
        return Operator.of(twins.node, twins.value)

    def _before(self, twins: Twins) -> Twins | None:
        """The makers of the one operand in which both differ, if the right one heals."""
        differing = self._differing(twins) if twins.twin is not None else []
        if len(differing) != 1 or differing[0][0] in self._theirs.constants:
            return None
        mine, other = differing[0]
        maker, twin = self._theirs.maker(mine), self._ours.maker(other)
        if maker is None or not self._heals_with(mine, other):
            return None
        return Twins(maker, mine, twin, other)

    def _past_idle(self, twins: Twins) -> Twins:
        """With the twin before nodes that only pass its numbers on, where theirs has none such."""
        twin, known = twins.twin, twins.known
        while twin is not None and twin.op_type != twins.node.op_type:
            if not self._is_idle(twin):
                return replace(twins, twin=twin, known=known)
            known = twin.input[0]
            twin = self._ours.maker(known)
        return twins if twin is None else replace(twins, twin=twin, known=known)

    def _is_idle(self, node: Any) -> bool:
        given, made = (self._ours.value(names[0]) for names in (node.input, node.output))
        return node.op_type in _IDLE or same(given, made, CLOSENESS[0])

    def _heals_with(self, mine: str, other: str) -> bool:
        """Whether our value in place of theirs heals; in its own shape if of another size."""
        value, array = self._theirs.value(mine), self._ours.value(other)
        if value is None or array is None:
            return False
        return self._heals(mine, array.reshape(value.shape) if array.size == value.size else array)

    def _differing(self, twins: Twins) -> list[tuple[str, str]]:
        return operands(self._theirs, twins.node, self._ours, twins.twin, CLOSENESS[0])

    def _told(self, how: Callable[..., tuple[str, str]], twins: Twins) -> tuple[str, str]:
        return how(self._theirs, twins.node, self._ours, twins.twin, CLOSENESS[0])

    def _upwards(self, twins: Twins) -> Iterator[Twins]:
        """A node with its twin, then those before it, as far as the two go the same way: a
        constant may be so little off that it shows only later."""
        queue, seen = [twins], {twins.value}
        for near in queue:
            yield near
            for mine, other in near.operands():
                maker, twin = self._theirs.maker(mine), self._ours.maker(other)
                if maker is not None and twin is not None and mine not in seen:
                    seen.add(mine)
                    queue.append(Twins(maker, mine, twin, other))
