"""Graphs made to show values within them, and to take given ones in their place."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

FORCED = "forced/"
"""What the input that stands in for a value is called, before the value's own name."""


def observed(model: Any, values: Iterable[str], forced: Collection[str] = ()) -> Any:
    """A copy of a ModelProto that also gives `values`, and reads those of `forced` as inputs.

    A forced value is still computed, so that it can be compared: only what reads it reads the
    input of its name after `FORCED`.
    """
    from onnx import ModelProto, ValueInfoProto

    copy = ModelProto()
    copy.CopyFrom(model)
    types = element_types(model, forced)
    for node in copy.graph.node:
        for number, name in enumerate(node.input):
            if name in types:
                node.input[number] = FORCED + name
    for name, kind in types.items():
        port = ValueInfoProto(name=FORCED + name)
        port.type.tensor_type.elem_type = kind
        copy.graph.input.append(port)
    given = {value.name for value in copy.graph.output}
    copy.graph.output.extend(
        ValueInfoProto(name=v) for v in dict.fromkeys(values) if v not in given
    )
    return copy


def element_types(model: Any, values: Collection[str]) -> dict[str, int]:
    """The element type of each value: what ONNX infers, else float32."""
    from onnx import TensorProto, shape_inference

    if not values:
        return {}
    inferred = shape_inference.infer_shapes(model).graph
    known = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.output)}
    known |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {name: known.get(name) or TensorProto.FLOAT for name in values}


def segment(model: Any, value: str, stops: Collection[str]) -> list[Any]:
    """The nodes that make `value`, back to values of `stops` and to what no input changes, in the
    graph's order."""
    maker = {name: node for node in model.graph.node for name in node.output if name}
    wanted: set[str] = set()
    queue = [value]
    while queue:
        name = queue.pop()
        if name in wanted or name not in maker or (name in stops and name != value):
            continue
        wanted.add(name)
        queue += [source for source in maker[name].input if source]
    return [node for node in model.graph.node if wanted & set(node.output)]


def extract(model: Any, value: str, stops: Collection[str]) -> Any:
    """A ModelProto of the segment that makes `value` alone; what it reads of `stops`, and of the
    graph's inputs, it takes as inputs."""
    from onnx import ModelProto, ValueInfoProto

    nodes = segment(model, value, stops)
    made = {name for node in nodes for name in node.output}
    read = {name for node in nodes for name in node.input if name} - made
    kinds = element_types(model, read & set(stops))
    part = ModelProto()
    part.CopyFrom(model)
    for field in ("node", "input", "output", "initializer", "value_info"):
        part.graph.ClearField(field)
    part.graph.node.extend(nodes)
    part.graph.initializer.extend(t for t in model.graph.initializer if t.name in read)
    part.graph.input.extend(port for port in model.graph.input if port.name in read)
    for name, kind in kinds.items():
        port = ValueInfoProto(name=name)
        port.type.tensor_type.elem_type = kind
        part.graph.input.append(port)
    part.graph.output.append(ValueInfoProto(name=value))
    return part
