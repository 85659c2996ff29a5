"""Where a graph and the live model can be compared: the values at the edges of their modules.

A module's parameters say where it is in any exporter's graph: the node that first mixes what is
made of a parameter alone with what is made of the inputs is the module's own, and its result, after
the bias, the module's output. Before it lies the module's input; before a norm, past what the norm
itself computes of it, the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.arch import Architecture, Role

STREAM, INPUT, OUTPUT = "stream", "input", "output"
_READ = ("o_proj", "down_proj")
"""Roles whose input is a boundary too: what heads give, and what neurons give."""
_ACTIVATED = ("BiasGelu", "FastGelu", "QuickGelu", "BiasSplitGelu", "FusedGemm")
"""ONNX Runtime's operators that add a bias, or multiply, and apply an activation at once: the
module's own output is nowhere in such a graph."""
_NARROW = (10, 16)
"""What ONNX numbers FLOAT16 and BFLOAT16."""
_SAME = ("Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Boundary:
    """One value of the graph and what it is in the model.

    side: `output` of the module of `role` in `layer`, its `input`, or the residual `stream` that
    a norm reads; value: its name in the graph.
    """

    role: str
    layer: int | None
    side: str
    value: str

    @property
    def site(self) -> str:
        """For people: `o_proj.3`, `o_proj.3 input`, `stream before mlp_norm.3`."""
        where = self.role if self.layer is None else f"{self.role}.{self.layer}"
        named = {OUTPUT: where, INPUT: f"{where} input", STREAM: f"stream before {where}"}
        return named[self.side]


def output_of(output: str, value: str | None = None) -> Boundary:
    """A task's output as a boundary, after all others; `value`: what the graph calls it."""
    return Boundary(output, None, OUTPUT, value or output)


def find_boundaries(
    graph: Any, owners: Mapping[str, Role], arch: Architecture
) -> tuple[Boundary, ...]:
    """The boundaries of a GraphProto in the order it computes them; `owners` says which role's
    parameter an initializer is. Experts, which tokens pass in no fixed shape, have none."""
    flow = _Flow(graph, owners)
    order = {name: number for number, node in enumerate(graph.node) for name in node.output}
    found: dict[str, Boundary] = {}
    for (role, layer), (first, last) in flow.modules(arch).items():
        if arch.facts.modules[role].type == "norm":
            source = flow.norm_input(first)
            if source in order:
                found.setdefault(source, Boundary(role, layer, STREAM, source))
        elif role in _READ:
            [source] = flow.activations(first)[:1]
            if source in order:
                found.setdefault(source, Boundary(role, layer, INPUT, source))
        found[last] = Boundary(role, layer, OUTPUT, last)
    return tuple(sorted(found.values(), key=lambda boundary: order[boundary.value]))


def find_streams(
    graph: Any, owners: Mapping[str, Role], arch: Architecture
) -> tuple[Boundary, ...]:
    """What every norm of a GraphProto reads, in the order it is computed, also where it is another
    module's output."""
    flow = _Flow(graph, owners)
    order = {name: number for number, node in enumerate(graph.node) for name in node.output}
    found = []
    for (role, layer), (first, _) in flow.modules(arch).items():
        if arch.facts.modules[role].type == "norm":
            source = flow.norm_input(first)
            if source in order:
                found.append(Boundary(role, layer, STREAM, source))
    return tuple(sorted(found, key=lambda boundary: order[boundary.value]))


class _Flow:
    """What of a graph is made of parameters alone, and what of the inputs."""

    def __init__(self, graph: Any, owners: Mapping[str, Role]) -> None:
        self._maker = {name: node for node in graph.node for name in node.output if name}
        self._graph, self._owners = graph, owners
        self._constant = {tensor.name for tensor in graph.initializer}
        self._narrow = {t.name for t in graph.initializer if t.data_type in _NARROW}
        self._owner: dict[str, set[Role]] = {name: {role} for name, role in owners.items()}
        self._mixed: list[Any] = []
        for node in graph.node:
            inputs = [name for name in node.input if name]
            if all(name in self._constant for name in inputs):
                self._constant |= set(node.output)
                owned = set().union(*(self._owner.get(name, set()) for name in inputs))
                self._owner |= {name: owned for name in node.output if owned}
            elif any(name in self._owner for name in inputs):
                self._mixed.append(node)
        self._dominator = self._dominators()

    def activations(self, node: Any) -> list[str]:
        """The inputs of a node that depend on the graph's inputs."""
        return [name for name in node.input if name and name not in self._constant]

    def modules(self, arch: Architecture) -> dict[tuple[str, int | None], tuple[Any, str]]:
        """Role and layer to the node that first reads its parameter and to the module's output."""
        found: dict[tuple[str, int | None], tuple[Any, str]] = {}
        for node in self._mixed:
            for key in self._keys(node, arch):
                first, last = found.get(key, (node, ""))
                if not last or self._follows(node, last):
                    found[key] = (first, node.output[0])
        embed = arch.facts.tie.embed, None
        if embed in found:
            first, last = found[embed]
            wide = self._widened(first, last)
            found[embed] = first, self._scaled(wide) if arch.facts.scaled_embedding else wide
        return {key: own for key, own in found.items() if not self._is_activated(own[1])}

    def _is_activated(self, value: str) -> bool:
        """Whether what a module gives went through an activation in the very same node."""
        return value in self._maker and self._maker[value].op_type in _ACTIVATED

    def _widened(self, lookup: Any, value: str) -> str:
        """What a lookup gives in the type that is computed in, where its table has another."""
        narrow = any(name in self._narrow for name in lookup.input)
        casts = [n for n in self._graph.node if n.op_type == "Cast" and value in n.input]
        return str(casts[0].output[0]) if narrow and len(casts) == 1 else value

    def _scaled(self, value: str) -> str:
        """What an embedding gives that multiplies its rows by a number."""
        for node in self._graph.node:
            if node.op_type == "Mul" and self.activations(node) == [value]:
                return str(node.output[0])
        return value

    def _keys(self, node: Any, arch: Architecture) -> Iterator[tuple[str, int | None]]:
        for name in node.input:
            for role in self._owner.get(name, ()):
                if role.expert is None and "expert" not in role.role:
                    named = self._named(role.role, node, arch)
                    if named is not None:
                        yield named, role.layer

    def _named(self, role: str, node: Any, arch: Architecture) -> str | None:
        """The role a node plays that reads this one's parameter: a table looked up in beforehand,
        at positions that are always the same, is nobody's output; a tied one is the head's."""
        if arch.facts.modules[role].type != "embedding" or node.op_type == "Gather":
            return role
        return arch.facts.tie.head if role == arch.facts.tie.embed else None

    def _follows(self, node: Any, value: str) -> bool:
        """Whether the node reads `value`, past nodes that give the same numbers."""
        return value in {self._source(name) for name in self.activations(node)} | set(node.input)

    def _source(self, name: str) -> str:
        while name in self._maker and self._maker[name].op_type in _SAME:
            name = self._maker[name].input[0]
        return name

    def norm_input(self, node: Any) -> str:
        """What a norm normalises: the value that all of what it computes is made of."""
        [value] = self.activations(node)[:1]
        if node.op_type in (
            "LayerNormalization",
            "RMSNormalization",
            "SimplifiedLayerNormalization",
        ):
            return value
        while value in self._maker:
            sources = self.activations(self._maker[value])
            if len(set(sources)) > 1:
                return self._dominator[value]
            if not sources:
                return value
            value = sources[0]
        return value

    def _dominators(self) -> dict[str, str]:
        """Value to the nearest one before it that all its paths from the inputs go through."""
        depth: dict[str, int] = {"": 0}
        dominator: dict[str, str] = {}
        for node in self._graph.node:
            sources = self.activations(node)
            common = sources[0] if sources else ""
            for name in sources[1:]:
                common = _common(common, name, dominator, depth)
            for name in node.output:
                dominator[name] = common
                depth[name] = depth.get(common, 0) + 1
        return dominator


def _common(one: str, other: str, dominator: Mapping[str, str], depth: Mapping[str, int]) -> str:
    while one != other:
        if depth.get(one, 0) < depth.get(other, 0):
            one, other = other, one
        if not one:
            return ""
        one = dominator.get(one, "")
    return one


def owners_of(
    initializers: Iterable[tuple[str, Iterable[str]]], arch: Architecture
) -> dict[str, Role]:
    """Initializer to role, from what tensors each is made of; an initializer that several tensors
    share, or that joins some, belongs to the first."""
    found = {}
    for name, tensors in initializers:
        roles = [arch.roles[tensor] for tensor in tensors if tensor in arch.roles]
        if roles:
            found[name] = roles[0]
    return found
