"""Sizes inside a captured graph are known as far as they follow from its inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest

from surgery.export.axes import name_axes
from surgery.export.capture import capture, serialized
from tests.models import make

NAMES = {
    "causal-lm": {"batch_size", "sequence_length"},
    "causal-lm-with-past": {
        "batch_size",
        "sequence_length",
        "past_sequence_length",
        "past_sequence_length + sequence_length",
    },
}


def value(name: str, *shape: int | str) -> Any:
    return onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape))


def chain(given: Any, *values: Any) -> Any:
    """A graph that hands `given` on as each of `values` in turn; the last is its output."""
    nodes = []
    for before, after in zip((given, *values), values, strict=False):
        nodes.append(onnx_ir.Node("", "Identity", [before], outputs=[after]))
    return onnx_ir.Graph([given], values[-1:], nodes=nodes)


def sizes(found: Any) -> list[Any]:
    return [size if isinstance(size, int) else size.value for size in found.shape]


def test_a_size_is_called_as_the_axis_it_follows_from_and_any_other_is_unknown() -> None:
    inside = value("x", "s1", "s7", "2*s1", "64", 3)
    graph = chain(value("input_ids", "s1", "s7"), inside, value("logits", "s1", "s7", 9))
    name_axes(graph)
    assert sizes(graph.inputs[0]) == ["batch_size", "sequence_length"]
    assert sizes(inside) == ["batch_size", "sequence_length", None, 64, 3]
    assert sizes(graph.outputs[0]) == ["batch_size", "sequence_length", 9]


def test_a_fixed_axis_of_an_output_stays_a_number() -> None:
    graph = chain(value("input_ids", "s1", "s7"), value("pooler_output", "s1", "32"))
    name_axes(graph)
    assert sizes(graph.outputs[0]) == ["batch_size", 32]


@pytest.mark.parametrize("task", NAMES)
def test_a_captured_graph_knows_its_sizes_and_they_agree(tmp_path: Path, task: str) -> None:
    """Every projection has a shape, and none contradicts what ONNX infers."""
    proto = onnx.load_model_from_string(serialized(capture(make("llama", tmp_path / "m"), task)))
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    graph = proto.graph
    known = {v.name: v.type.tensor_type.shape.dim for v in [*graph.value_info, *graph.output]}
    named = {size.dim_param for shape in known.values() for size in shape if size.dim_param}
    assert named <= NAMES[task]
    projections = [n for n in graph.node if n.op_type == "MatMul" and "proj" in n.name]
    assert len(projections) == 14
    for node in projections:
        free = [size.dim_param for size in known[node.output[0]]]
        assert free == ["batch_size", "sequence_length", ""], node.name
