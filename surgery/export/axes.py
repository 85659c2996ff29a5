"""Readable names for a graph's free axes; torch numbers its symbols in an order of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_TOTAL = "past_sequence_length + sequence_length"


def name_axes(graph: Any) -> None:
    """Renames the axes of inputs and outputs, and of every value within whose size follows.

    Other sizes within stay unknown. They are kept at all because ONNX Runtime, when it looks for
    memory to use again, tries each value of unknown size against all that came before.
    """
    cached = any(value.name.startswith("past_key_values.") for value in graph.inputs)
    outer = {value: _free_axes(value, cached) for value in [*graph.inputs, *graph.outputs]}
    known = {str(v.shape[axis]): name for v in graph.inputs for axis, name in outer[v].items()}
    for value in (value for node in graph for value in node.outputs if value not in outer):
        if value.shape is not None:
            value.shape = _shape(value.shape, {}, known)
    for value, names in outer.items():
        value.shape = _shape(value.shape, names, {})


def _free_axes(value: Any, cached: bool) -> dict[int, str]:
    """What the axes of a graph input or output are called where they are free."""
    stem = value.name.partition(".")[0]
    if stem in ("past_key_values", "present"):
        return {0: "batch_size", 2: _TOTAL if stem == "present" else "past_sequence_length"}
    return {
        0: "batch_size",
        1: _TOTAL if stem == "attention_mask" and cached else "sequence_length",
    }


def _shape(shape: Any, names: Mapping[int, str], known: Mapping[str, str]) -> Any:
    import onnx_ir

    return onnx_ir.Shape([_size(str(size), names.get(n), known) for n, size in enumerate(shape)])


def _size(text: str, name: str | None, known: Mapping[str, str]) -> int | str | None:
    """torch writes even a fixed axis as a symbol, whose name is then the number."""
    return int(text) if re.fullmatch(r"\d+", text) else name or known.get(text)
