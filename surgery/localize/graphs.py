"""Graphs made to show values within them, and to take given ones in their place."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from surgery.runtimes.segments import element_types

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
