"""A segment of a graph with the values it computes, and how two segments differ."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import quote

Array = NDArray[Any]

_EITHER_WAY = ("Add", "Mul", "And", "Or", "Max", "Min")
"""Operators that give the same whichever way round their operands come."""
_CLOSE = 2e-6
"""Operands that differ by this much of the larger at most are the same to a twin."""
_MAX_ELEMENTS = 2**20
_MAX_SHOWN = 4
"""A constant of more elements is not told in numbers."""


@dataclass(frozen=True)
class Segment:
    """The nodes that make one value, in the graph's order; `values` holds what they compute and
    what they are given, `constants` the numbers of initializers."""

    nodes: Sequence[Any]
    values: Mapping[str, Array]
    constants: Mapping[str, Array]

    def value(self, name: str) -> Array | None:
        return self.values[name] if name in self.values else self.constants.get(name)

    @classmethod
    def of(
        cls, nodes: Sequence[Any], values: Mapping[str, Array], constants: Mapping[str, Array]
    ) -> Segment:
        """With what is computed of constants alone among the constants."""
        known = dict(constants)
        for node in nodes:
            if node.input and all(name in known for name in node.input if name):
                known |= {name: values[name] for name in node.output if name in values}
        return cls(nodes, values, known)

    def maker(self, name: str) -> Any:
        """The node that makes a value; None for what the segment is given."""
        return next((node for node in self.nodes if name in node.output), None)

    def results(self) -> Iterator[tuple[Any, str]]:
        """Every node with each value it makes."""
        for node in self.nodes:
            for name in node.output:
                if name in self.values:
                    yield node, name


def constants(model: Any, folder: Path, weights: Collection[str]) -> dict[str, Array]:
    """The numbers of a ModelProto's constants, initializers or nodes; of no `weights`, and of
    nothing large."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
    return {
        name: numpy_helper.to_array(tensor, str(folder))
        for name, tensor in tensors.items()
        if name not in weights and math.prod(tensor.dims) <= _MAX_ELEMENTS
    }


def same(a: Array | None, b: Array | None, closeness: float) -> bool:
    """Whether two arrays hold the same numbers in the same order, shapes aside: floats to
    `closeness` of the largest, anything else exactly."""
    if a is None or b is None or a.size != b.size or a.dtype.kind != b.dtype.kind:
        return False
    left, right = a.reshape(-1), b.reshape(-1)
    if a.dtype.kind != "f":
        return bool((left == right).all())
    scale = float(np.abs(right[np.isfinite(right)]).max(initial=0.0))
    return bool(np.isclose(left, right, rtol=0, atol=closeness * scale, equal_nan=True).all())


def unmatched(one: Segment, other: Segment, closeness: float) -> list[tuple[Any, str]]:
    """The nodes of `one` whose value `other` has nowhere, each with that value's name; those that
    compute with whole numbers, shapes mostly, last."""
    known = list(other.values.values())
    found = [
        (node, name)
        for node, name in one.results()
        if name not in one.constants
        and not any(same(one.values[name], value, closeness) for value in known)
    ]
    return sorted(found, key=lambda pair: one.values[pair[1]].dtype.kind in "iu")


def likest(node: Any, name: str, one: Segment, other: Segment) -> list[tuple[Any, str]]:
    """Nodes of `other` whose value could be in the place of what `node` of `one` calls `name`: the
    nearest number by number first, then those of the same kind of node, first those that read
    most of the same; each with that value's name."""
    array = one.values[name]
    alike = [
        (twin, value)
        for twin, value in other.results()
        if other.values[value].size == array.size
        and other.values[value].dtype.kind == array.dtype.kind
        and value not in other.constants
    ]
    near = min(alike, key=lambda pair: _distance(array, other.values[pair[1]]), default=None)
    twins = [pair for pair in alike if pair[0].op_type == node.op_type and pair != near]
    twins.sort(key=lambda pair: len(operands(one, node, other, pair[0], _CLOSE)))
    return [*([near] if near else []), *twins]


def _distance(a: Array, b: Array) -> float:
    """The mean difference, whatever is not finite counted as none."""
    left, right = (_finite(x) for x in (a, b))
    return float(np.abs(left - right).mean()) if a.size else 0.0


def difference(
    one: Segment, node: Any, other: Segment, twin: Any, closeness: float
) -> tuple[str, str]:
    """What sets a node apart from its twin in the other segment, in words, and the constant that
    does, if one; empty if nothing tells."""
    known = other.value(twin.output[0])
    if any(same(one.values.get(name), known, closeness) for name in node.input):
        return "which a fresh graph has not", ""
    if node.op_type != twin.op_type:
        return f"where a fresh graph has {twin.op_type}", ""
    return constant_difference(one, node, other, twin, closeness)


def constant_difference(
    one: Segment, node: Any, other: Segment, twin: Any, closeness: float
) -> tuple[str, str]:
    """As `difference`, of constants and attributes alone."""
    if node.op_type != twin.op_type:
        return "", ""
    for mine, theirs in operands(one, node, other, twin, closeness):
        expected = other.value(theirs)
        if mine in one.constants and expected is not None:
            told = _told(one.constants[mine]), _told(expected)
            return f"which reads {quote(mine)} = {told[0]}, in a fresh graph {told[1]}", mine
    return _attributes(node, twin), ""


def operands(
    one: Segment, node: Any, other: Segment, twin: Any, closeness: float
) -> list[tuple[str, str]]:
    """The operands of a node that differ from those of its twin, in pairs; none where the two do
    not compare."""
    if len(node.input) != len(twin.input) or node.op_type != twin.op_type:
        return []
    orders = [list(twin.input)]
    if node.op_type in _EITHER_WAY:
        orders.append(list(twin.input)[::-1])
    found = []
    for order in orders:
        pairs = list(zip(node.input, order, strict=True))
        found.append([p for p in pairs if not _agree(one, p[0], other, p[1], closeness)])
    return min(found, key=len)


def _agree(one: Segment, mine: str, other: Segment, theirs: str, closeness: float) -> bool:
    """Constants must be equal to a rounding: a small one may do much."""
    a, b = one.value(mine), other.value(theirs)
    if a is None or b is None:
        return True  # an input of the graph, or a weight: those have been looked at
    if mine in one.constants and a.size == b.size and a.dtype.kind == b.dtype.kind == "f":
        return bool(np.allclose(a.reshape(-1), b.reshape(-1), rtol=1e-6, atol=0))
    return same(a, b, closeness)


def _told(array: Array) -> str:
    if array.size > _MAX_SHOWN:
        return "other numbers"
    return ", ".join(f"{value:.7g}" for value in array.reshape(-1))


def _attributes(node: Any, twin: Any) -> str:
    from onnx import helper

    def values(of: Any) -> dict[str, Any]:
        return {a.name: helper.get_attribute_value(a) for a in of.attribute}

    mine, theirs = values(node), values(twin)
    for name in [*mine, *theirs]:
        one, other = mine.get(name), theirs.get(name)
        if one != other:
            return f"whose {name} is {_plain(one)}, in a fresh graph {_plain(other)}"
    return ""


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _finite(array: Array) -> Array:
    flat = array.reshape(-1).astype(np.float64)
    return np.nan_to_num(flat, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
