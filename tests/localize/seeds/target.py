"""Faults to plant in a portable export of ours, each with where it truly is.

A seed changes a ModelProto that has its weights inside and says what must be found: sites of
boundaries, and the node, the constant or the tensor. Nodes are found by their operators and by the
module path that our exports put into the names of values, never by what the localisation knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from tests.differential import mutants

Array = NDArray[Any]


class Unfit(Exception):
    """The graph has no place for this fault."""


@dataclass(frozen=True)
class Truth:
    """Where a fault is: a pattern of the sites that may be named, the values its node makes, the
    initializer, the tensors of which one is named. No sites: nothing to localise, only to catch."""

    sites: str = ""
    values: tuple[str, ...] = ()
    constant: str = ""
    tensors: tuple[str, ...] = ()


@dataclass
class Target:
    """A clean export to plant in: `tensors` is tensor to (initializer, whether it is turned),
    `roles` tensor to (role, layer), `other` reads the same family's tensors of another seed."""

    model: ModelProto
    layer: int
    tensors: dict[str, tuple[str, bool]]
    roles: dict[str, tuple[str, int | None]]
    other: Callable[[str], Array]
    sizes: dict[str, int] = field(default_factory=dict)

    # -------------------------------------------------------------------------------- nodes

    def nodes(self, *kinds: str, part: str = "", layer: bool = True) -> list[Any]:
        """Nodes of these kinds, of the layer, whose value's name has `part` in it."""
        wanted = re.compile(rf"\.{self.layer}[./]")
        return [
            node
            for node in self.model.graph.node
            if node.op_type in kinds
            and part in node.output[0]
            and (not layer or wanted.search(node.output[0]))
        ]

    def one(self, *kinds: str, part: str = "", layer: bool = True) -> Any:
        found = self.nodes(*kinds, part=part, layer=layer)
        if not found:
            raise Unfit
        return found[0]

    def maker(self, value: str) -> Any:
        return next((node for node in self.model.graph.node if value in node.output), None)

    def readers(self, value: str) -> list[Any]:
        return [node for node in self.model.graph.node if value in node.input]

    def softmax(self) -> Any:
        """The layer's attention: the softmax that a product reads."""
        for node in self.nodes("Softmax"):
            if any(reader.op_type == "MatMul" for reader in self.readers(node.output[0])):
                return node
        raise Unfit

    def scores(self) -> Any:
        """The product of queries and keys."""
        node = self.softmax()
        while node is not None and node.op_type != "MatMul":
            node = self.maker(node.input[0])
        if node is None:
            raise Unfit
        return node

    def sort(self) -> None:
        """Every node after those it reads."""
        nodes, made = list(self.model.graph.node), set[str]()
        later = {name for node in nodes for name in node.output}
        ordered: list[Any] = []
        while nodes:
            ready = [n for n in nodes if not (set(n.input) & later) - made]
            made |= {name for node in ready for name in node.output}
            ordered += ready
            nodes = [node for node in nodes if node not in ready]
        del self.model.graph.node[:]
        self.model.graph.node.extend(ordered)

    def insert(self, value: str, kind: str, *others: str, **attributes: Any) -> str:
        """One more node after `value`, which all its readers read instead; its own value."""
        new = f"{value}.{kind}"
        mutants._redirect(self.model, value, new)
        node = helper.make_node(kind, [value, *others], [new], name=new, **attributes)
        nodes = list(self.model.graph.node)
        place = 1 + next(n for n, each in enumerate(nodes) if value in each.output)
        self.model.graph.node.insert(place, node)
        return new

    # ------------------------------------------------------------------------------ weights

    def tensor(self, *roles: str, kind: str = "weight") -> str:
        """The layer's tensor of the first of `roles` that the model has."""
        for role in roles:
            for name, (own, layer) in self.roles.items():
                alike = own == role and layer in (self.layer, None) and name.endswith(kind)
                if alike and name in self.tensors:
                    return name
        raise Unfit

    def read(self, tensor: str) -> Array:
        """The weight as the checkpoint has it."""
        name, turned = self.tensors[tensor]
        values = mutants.weight(self.model, name)
        return np.ascontiguousarray(values.T) if turned else values

    def write(self, tensor: str, values: Array) -> Truth:
        name, turned = self.tensors[tensor]
        mutants.put(self.model, name, values.T if turned else values)
        return self.truth_of(tensor)

    def truth_of(self, tensor: str) -> Truth:
        role, layer = self.roles[tensor]
        return Truth(re.escape(role if layer is None else f"{role}.{layer}"), tensors=(tensor,))

    def constant(self, name: str, values: Array, sites: str) -> Truth:
        if name not in {tensor.name for tensor in self.model.graph.initializer}:
            raise Unfit
        mutants.put(self.model, name, values)
        return Truth(sites, constant=name)

    def times(self, name: str, factor: float, sites: str) -> Truth:
        values = mutants.weight(self.model, name)
        return self.constant(name, values * values.dtype.type(factor), sites)

    def is_constant(self, name: str) -> bool:
        return any(name == tensor.name for tensor in self.model.graph.initializer)

    @property
    def attention(self) -> str:
        return rf"o_proj\.{self.layer} input"

    @property
    def everywhere(self) -> str:
        """Where a fault of all layers' attention comes in."""
        return r"o_proj\.\d+ input"

    @property
    def mlp(self) -> str:
        dense = ("down_proj", self.layer) in self.roles.values()
        return rf"down_proj\.{self.layer} input" if dense else self.stream

    @property
    def stream(self) -> str:
        return r"stream before .*"


def rounded(values: Array) -> Array:
    """As bfloat16 would hold them."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)
