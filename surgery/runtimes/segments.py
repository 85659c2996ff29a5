"""Parts of an ONNX graph that can be run by themselves, from values given at their edges."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import OnnxError, quote


@dataclass(frozen=True, eq=False)
class Segment:
    """What of a graph lies between two of its cuts.

    It gives `outputs`, those of the graph, and the value at the cut `end`, which the last segment
    has not; it reads `inputs` of the graph and the values `reads` at earlier cuts. `later` are
    the cuts that segments after it read.
    """

    inputs: tuple[str, ...]
    reads: tuple[str, ...]
    end: str | None
    outputs: tuple[str, ...]
    later: frozenset[str]

    @property
    def values(self) -> tuple[str, ...]:
        """All that it gives."""
        end = () if self.end is None or self.end in self.outputs else (self.end,)
        return (*self.outputs, *end)


def cut_up(model: Any, cuts: Sequence[str]) -> tuple[Segment, ...]:
    """A ModelProto as one segment up to each of the values `cuts`, and one after the last.

    Each output of the graph comes from the first segment that can give it. What depends on inputs
    and constants alone is computed in every segment that reads it. Raises `OnnxError` where the
    graph computes no such value.
    """
    made = {name for node in model.graph.node for name in node.output}
    for cut in cuts:
        if cut not in made:
            raise OnnxError(f"the graph computes no value {quote(cut)} to be cut at")
    outputs: list[list[str]] = [[] for _ in (*cuts, None)]
    for value in model.graph.output:
        read = _read(model, [value.name], cuts)
        outputs[max((cuts.index(cut) + 1 for cut in read & set(cuts)), default=0)] += [value.name]
    ends = [*cuts, None]
    names = [
        _read(model, [*own, *([end] if end else [])], cuts)
        for own, end in zip(outputs, ends, strict=True)
    ]
    ports = [port.name for port in model.graph.input]
    return tuple(
        Segment(
            tuple(port for port in ports if port in names[number]),
            tuple(cut for cut in cuts if cut in names[number]),
            end,
            tuple(outputs[number]),
            frozenset(cut for cut in cuts if any(cut in later for later in names[number + 1 :])),
        )
        for number, end in enumerate(ends)
    )


def _read(model: Any, values: Sequence[str], stops: Collection[str]) -> set[str]:
    nodes = segment(model, values, stops)
    made = {name for node in nodes for name in node.output}
    return {name for node in nodes for name in _inputs(node)} - made


def element_types(model: Any, values: Collection[str]) -> dict[str, int]:
    """The element type of each value: what ONNX infers, else float32."""
    from onnx import TensorProto, shape_inference

    if not values:
        return {}
    inferred = shape_inference.infer_shapes(model).graph
    known = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.output)}
    known |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {name: known.get(name) or TensorProto.FLOAT for name in values}


def segment(model: Any, values: Collection[str], stops: Collection[str]) -> list[Any]:
    """The nodes that make `values`, back to those of `stops` and to what no input changes, in the
    graph's order."""
    maker = {name: node for node in model.graph.node for name in node.output if name}
    wanted: set[str] = set()
    queue = list(values)
    while queue:
        name = queue.pop()
        if name in wanted or name not in maker or (name in stops and name not in values):
            continue
        wanted.add(name)
        queue += _inputs(maker[name])
    return [node for node in model.graph.node if wanted & set(node.output)]


def _inputs(node: Any) -> Iterator[str]:
    """The names that a node, and what it holds of other graphs, reads."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (name for inner in graph.node for name in _inputs(inner))
            yield from (value.name for value in graph.output)


def extract(
    model: Any,
    values: Collection[str],
    stops: Collection[str],
    types: Mapping[str, int] | None = None,
) -> Any:
    """A ModelProto of the segment that makes `values` alone; what it reads of `stops`, and of the
    graph's inputs, it takes as inputs. `types`: the element types of `stops` where known."""
    from onnx import ModelProto, ValueInfoProto

    nodes = segment(model, values, stops)
    made = {name for node in nodes for name in node.output}
    read = {name for node in nodes for name in _inputs(node)} - made
    kinds = element_types(model, read & set(stops)) if types is None else types
    part = ModelProto(ir_version=model.ir_version)
    part.opset_import.extend(model.opset_import)
    part.functions.extend(model.functions)
    part.graph.name = model.graph.name
    part.graph.node.extend(nodes)
    part.graph.initializer.extend(t for t in model.graph.initializer if t.name in read)
    part.graph.input.extend(port for port in model.graph.input if port.name in read)
    for name in stops:
        if name in read:
            port = ValueInfoProto(name=name)
            port.type.tensor_type.elem_type = kinds[name]
            part.graph.input.append(port)
    part.graph.output.extend(ValueInfoProto(name=value) for value in values)
    return part
