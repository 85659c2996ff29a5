"""A graph of many layers from a trace of few: one region per layer, repeated.

Layers of one kind differ in their parameters alone. So two of each kind are traced, and where both
have the same operators on the same values, up to the layer's own parameters and cache and the
hidden state it is given, the first stands for all of its kind. A trace that does not keep to that
is `Unstitchable`: it is taken whole.

A region holds the nodes of its layer's module that depend on parameters or caches. What else was
traced inside a layer (masks, angles, sizes) is the same for all layers and goes into the prologue.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_SCOPES = "pkg.torch.onnx.name_scopes"
"""The metadata key in which torch's exporter keeps a node's module path."""
_PAST = "past_key_values"
_PRESENT = "present"


class Unstitchable(Exception):
    """The trace is not a sequence of layers that differ in their parameters alone."""


@dataclass(frozen=True)
class Layers:
    """`block` is the path of a layer's module with `{layer}`; `template[n]` the traced layer that
    stands for layer n; `twins` pairs of traced layers that must be the same."""

    block: str
    template: tuple[int, ...]
    twins: tuple[tuple[int, int], ...] = ()

    def renamed(self, name: str, layer: int, other: int) -> str:
        """The name that layer `other` gives to what layer `layer` calls `name`."""
        for stem in (self.block, f"{_PAST}.{{layer}}", f"{_PRESENT}.{{layer}}"):
            own = stem.format(layer=layer)
            if name.startswith(f"{own}."):
                return stem.format(layer=other) + name.removeprefix(own)
        return name


@dataclass
class _Region:
    """A traced layer: its nodes, the hidden state it is given and the one it hands on."""

    nodes: list[Any] = field(default_factory=list)
    given: Any = None
    gives: Any = None


@dataclass
class _Parts:
    prologue: list[Any] = field(default_factory=list)
    regions: dict[int, _Region] = field(default_factory=dict)
    epilogue: list[Any] = field(default_factory=list)


def stitch(graph: Any, layers: Layers, parameters: Iterable[str]) -> Any:
    """An `onnx_ir.Graph` of `len(layers.template)` layers from the traced `graph`.

    `parameters` names the initializers that are parameters. Raises `Unstitchable`.
    """
    parts = _partition(graph, layers, set(parameters))
    for twins in layers.twins:
        _check_twins(parts.regions, *twins, layers)
    return _Weaver(graph, layers, parts).weave()


def scopes(node: Any) -> list[str]:
    """Paths of the modules a node was traced in, from the outermost to the innermost."""
    found: list[str] = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return found[:-1]


def _layer_finder(block: str) -> Callable[[Any], int | None]:
    before, after = map(re.escape, block.split("{layer}"))
    pattern = re.compile(rf"{before}(\d+){after}")

    def find(node: Any) -> int | None:
        matches = (pattern.fullmatch(path) for path in scopes(node))
        return next((int(match[1]) for match in matches if match), None)

    return find


def _partition(graph: Any, layers: Layers, parameters: set[str]) -> _Parts:
    find_layer, parts = _layer_finder(layers.block), _Parts()
    own = {value for name, value in graph.initializers.items() if name in parameters}
    own |= {value for value in graph.inputs if value.name.startswith(f"{_PAST}.")}
    variant, after, made_in = set(own), set[Any](), dict[Any, int]()
    for node in graph:
        layer, inputs = find_layer(node), set(node.inputs) - {None}
        if not scopes(node) and not inputs & after:
            # What the exporter put in for another node belongs where its input is from.
            layer = max((made_in[value] for value in inputs if value in made_in), default=None)
        if layer is not None and inputs & variant:
            parts.regions.setdefault(layer, _Region()).nodes.append(node)
            made_in |= dict.fromkeys(node.outputs, layer)
            variant |= set(node.outputs)
        elif inputs & after or any(value in made_in for value in inputs):
            parts.epilogue.append(node)
            after |= set(node.outputs)
            variant |= set(node.outputs)
        else:
            parts.prologue.append(node)
            # What a size was read from does not matter to what the size is.
            if inputs & variant and node.op_type != "Shape":
                variant |= set(node.outputs)
    _link(parts, graph, variant - own, made_in)
    return parts


def _link(parts: _Parts, graph: Any, variant: set[Any], made_in: Mapping[Any, int]) -> None:
    """Finds the one value that each region is given, and hands on."""
    count = len(parts.regions)
    if not count or sorted(parts.regions) != list(range(count)):
        raise Unstitchable(f"layers {sorted(parts.regions)} are not all there is")
    for layer, region in parts.regions.items():
        taken = _taken(region.nodes, variant)
        others = {value for value in taken if made_in.get(value) != layer}
        region.given = _only(others, f"layer {layer} is given")
        if made_in.get(region.given, -1) != layer - 1:
            raise Unstitchable(f"layer {layer} does not continue layer {layer - 1}")
        if layer:
            parts.regions[layer - 1].gives = region.given
    outputs = {value for value in graph.outputs if not _is_cache(value)}
    left = (_taken(parts.epilogue, variant) | outputs) & set(made_in)
    parts.regions[count - 1].gives = _only(left, "what follows the layers is given")
    if made_in[parts.regions[count - 1].gives] != count - 1:
        raise Unstitchable("what follows the layers does not continue the last")


def _taken(nodes: Iterable[Any], variant: set[Any]) -> set[Any]:
    return {value for node in nodes for value in node.inputs if value in variant}


def _only(values: set[Any], what: str) -> Any:
    if len(values) != 1:
        raise Unstitchable(f"{what} {len(values)} values")
    return values.pop()


def _check_twins(regions: Mapping[int, _Region], first: int, second: int, layers: Layers) -> None:
    """Raises `Unstitchable` unless the regions are the same, each with its own parameters."""
    one, other = regions[first], regions[second]
    where = f"layers {first} and {second} differ"

    def twins(left: Any, right: Any) -> bool:
        """Whether what comes from outside is each layer's own, or the same and no layer's."""
        if left is None or right is None:
            return left is right
        named = layers.renamed(left.name, first, second)
        return left is right if named == left.name else named == right.name

    if len(one.nodes) != len(other.nodes):
        raise Unstitchable(where)
    same = {one.given: other.given}
    for a, b in zip(one.nodes, other.nodes, strict=True):
        if _signature(a) != _signature(b):
            raise Unstitchable(f"{where} at {a.op_type}")
        for left, right in zip(a.inputs, b.inputs, strict=True):
            equal = same[left] is right if left in same else twins(left, right)
            if not equal:
                raise Unstitchable(f"{where} in what {a.op_type} reads")
        same |= dict(zip(a.outputs, b.outputs, strict=True))
    if same.get(one.gives) is not other.gives:
        raise Unstitchable(f"{where} in what they hand on")


def _signature(node: Any) -> tuple[Any, ...]:
    attributes = {name: _content(attribute) for name, attribute in node.attributes.items()}
    return node.domain, node.op_type, len(node.inputs), len(node.outputs), attributes


def _content(attribute: Any) -> Any:
    import onnx_ir

    if attribute.type == onnx_ir.AttributeType.TENSOR:
        tensor = attribute.value
        return tensor.dtype, tuple(tensor.shape), tensor.tobytes()
    if attribute.type in (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS):
        # Graphs inside nodes see values by name; nothing here follows them.
        raise Unstitchable(f"a node holds a graph in {attribute.name}")
    return attribute.type, attribute.value


class _Weaver:
    """Builds the new graph; `_values` maps traced values to those of the layer being made."""

    def __init__(self, graph: Any, layers: Layers, parts: _Parts) -> None:
        self._graph, self._layers, self._parts = graph, layers, parts
        self._find_layer = _layer_finder(layers.block)
        self._values: dict[Any, Any] = {}
        self._made: dict[str, Any] = {}
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []

    def weave(self) -> Any:
        import onnx_ir

        graph = self._graph
        self._inputs += [self._source(value) for value in graph.inputs if not _is_cache(value)]
        self._copy(self._parts.prologue)
        hidden = self._values.get(self._parts.regions[0].given)
        present: list[Any] = []
        for layer, traced in enumerate(self._layers.template):
            region = self._parts.regions[traced]
            self._values[region.given] = hidden
            self._copy(region.nodes, (traced, layer))
            hidden = self._values[region.gives]
            present += self._presents(region, traced, layer)
        self._values[self._parts.regions[len(self._parts.regions) - 1].gives] = hidden
        self._copy(self._parts.epilogue)
        wanted = [value for value in graph.outputs if not _is_cache(value)]
        for value in wanted:
            self._values[value].name = value.name
        return onnx_ir.Graph(
            sorted(self._inputs, key=_input_order),
            [*(self._values[value] for value in wanted), *present],
            nodes=self._nodes,
            initializers=[v for v in self._made.values() if v.const_value is not None],
            opset_imports=graph.opset_imports,
            name=graph.name,
        )

    def _copy(self, nodes: Iterable[Any], layer: tuple[int, int] | None = None) -> None:
        import onnx_ir

        for node in nodes:
            copy = onnx_ir.Node(
                node.domain,
                node.op_type,
                [value and self._value(value, layer) for value in node.inputs],
                node.attributes.values(),
                overload=node.overload,
                num_outputs=len(node.outputs),
                metadata_props=dict(node.metadata_props),
            )
            self._rescope(copy, layer or self._first(node))
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.name, new.shape, new.type = old.name, old.shape, old.type
                self._values[old] = new
            self._nodes.append(copy)

    def _first(self, node: Any) -> tuple[int, int] | None:
        """The traced layer of a node that is in no region, and the first layer that is one."""
        traced, template = self._find_layer(node), self._layers.template
        return (traced, template.index(traced)) if traced in template else None

    def _rescope(self, node: Any, layer: tuple[int, int] | None) -> None:
        if layer:
            old, new = (self._layers.block.format(layer=number) for number in layer)
            path = node.metadata_props[_SCOPES]
            node.metadata_props[_SCOPES] = re.sub(rf"{re.escape(old)}(?=['.])", new, path)

    def _value(self, value: Any, layer: tuple[int, int] | None) -> Any:
        if value.producer() is not None:
            return self._values[value]
        return self._source(value, layer)

    def _source(self, value: Any, layer: tuple[int, int] | None = None) -> Any:
        """The graph input or initializer that the layer being made has for `value`."""
        import onnx_ir

        name = self._layers.renamed(value.name, *layer) if layer else value.name
        if name not in self._made:
            self._made[name] = onnx_ir.Value(
                name=name, shape=value.shape, type=value.type, const_value=value.const_value
            )
            if _is_cache(value):
                self._inputs.append(self._made[name])
        return self._made[name]

    def _presents(self, region: _Region, traced: int, layer: int) -> list[Any]:
        inside = {value for node in region.nodes for value in node.outputs}
        found = []
        for value in self._graph.outputs:
            if value in inside and _is_cache(value):
                copy = self._values[value]
                copy.name = self._layers.renamed(value.name, traced, layer)
                found.append(copy)
        return found


def _input_order(value: Any) -> tuple[int, str]:
    """Caches last, layer by layer, keys first; others as they were."""
    if not _is_cache(value):
        return -1, ""
    _, layer, part = value.name.split(".")
    return int(layer), part


def _is_cache(value: Any) -> bool:
    return bool(value.name.startswith((f"{_PAST}.", f"{_PRESENT}.")))
