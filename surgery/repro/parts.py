"""Parts of graphs as models of their own: cut out, with their weights inside, renamed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from surgery.errors import InputError
from surgery.runtimes.segments import extract

MAX_PART_BYTES = 1 << 30
"""Weights that are taken into memory for one part."""


def cut(model: Any, value: str, stops: Collection[str], folder: Path) -> Any:
    """A ModelProto of what makes `value` from those of `stops` and from the graph's inputs, its
    weights inside and nothing else of the file: no notes on who exported it, and where.

    Raises `InputError` where the weights are too many to be taken in.
    """
    from onnx.external_data_helper import load_external_data_for_model

    part = extract(model, [value], set(stops) - {value})
    needed = sum(_bytes(tensor) for tensor in part.graph.initializer)
    if needed > MAX_PART_BYTES:
        raise InputError(
            f"the part of the graph that makes {value} has {needed} bytes of weights; expected at "
            f"most {MAX_PART_BYTES} for one that others can run"
        )
    load_external_data_for_model(part, str(folder))
    _forget(part)
    return part


def _bytes(tensor: Any) -> int:
    from onnx import helper

    size = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(math.prod(tensor.dims) * size)


def _forget(part: Any) -> None:
    """Exporters leave stack traces, and with them the paths of a machine."""
    graph = part.graph
    for holder in (part, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        holder.ClearField("metadata_props")
        holder.ClearField("doc_string")
    for name in ("producer_name", "producer_version", "domain", "model_version"):
        part.ClearField(name)
    graph.name = "part"


def copied(model: Any) -> Any:
    from onnx import ModelProto

    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def renamed(model: Any, names: Mapping[str, str]) -> Any:
    """A copy in which values have other names; what had one of these before gets another."""
    copy = copied(model)
    taken = set(names.values()) - set(names)

    def new(name: str) -> str:
        return names.get(name) or (f"fresh/{name}" if name in taken else name)

    for node in copy.graph.node:
        node.input[:] = [new(name) if name else "" for name in node.input]
        node.output[:] = [new(name) if name else "" for name in node.output]
    for field in (copy.graph.initializer, copy.graph.input, copy.graph.output):
        for holder in field:
            holder.name = new(holder.name)
    return copy


def ending_at(model: Any, value: str, name: str) -> Any:
    """What makes `value` in a part, given as the output `name`."""
    part = extract(model, [value], ())
    return part if value == name else renamed(part, {value: name})


def watched(model: Any) -> Any:
    """A copy that also gives what each of its nodes makes."""
    copy = copied(model)
    given = {value.name for value in copy.graph.output}
    for node in copy.graph.node:
        for name in node.output:
            if name and name not in given:
                copy.graph.output.add().name = name
    return copy


def typed(model: Any, arrays: Mapping[str, Any]) -> None:
    """Declares what a part takes and gives by the types and ranks of the arrays that were."""
    from onnx import helper

    for value in (*model.graph.input, *model.graph.output):
        if value.name in arrays:
            kind, array = value.type.tensor_type, arrays[value.name]
            kind.elem_type = helper.np_dtype_to_tensor_dtype(array.dtype)
            del kind.shape.dim[:]
            kind.shape.dim.extend(type(kind.shape).Dimension() for _ in range(array.ndim))
            kind.shape.SetInParent()
