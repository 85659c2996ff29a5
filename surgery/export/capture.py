"""A checkpoint's computation as an ONNX graph, through transformers' own exporter.

The graph keeps the state-dict names of its parameters as initializer names (`optimize=False`
upstream: nothing is folded, transposed or merged into them), so that `bind` can put the
checkpoint's own numbers there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from surgery.errors import ExportError, quote
from surgery.export.load import load_model
from surgery.export.quiet import quiet
from surgery.export.tasks import Task, find_task

BATCH = 2
DEFAULT_OPSET = 20
ALIASES = "surgery.aliases"
"""Key in `Model.meta` (never written to a file): parameter name to all names of that tensor."""

_CACHE_NAME = re.compile(r"(input|output)\.past_key_values\.layers\.(\d+)\.(keys|values)")


def capture(model_dir: Path, task: str, opset: int = DEFAULT_OPSET, dtype: str = "float32") -> Any:
    """The `onnx_ir.Model` of the checkpoint for `task`, computing in `dtype`.

    Inputs and outputs have optimum's names; batch, length and cache length are symbolic. Raises
    `ExportError` when the exporter fails or bakes one of them in, `CheckpointError` when the
    model cannot be loaded.
    """
    wanted = find_task(task)
    model = load_model(model_dir, wanted, dtype)
    with quiet():
        graph_model = _trace(model, wanted, opset, model_dir)
        _rename(graph_model.graph)
        _clean(graph_model)
    _check_dynamic(graph_model.graph, wanted)
    _name_axes(graph_model.graph)
    graph_model.meta[ALIASES] = _aliases(model)
    return graph_model


def _trace(model: Any, task: Task, opset: int, model_dir: Path) -> Any:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    inputs, shapes = _sample(model, task)
    config = OnnxConfig(dynamic=True, optimize=False, opset_version=opset, dynamic_shapes=shapes)
    try:
        return OnnxExporter().export(model, inputs, config).program
    except Exception as error:  # torch.export and torch.onnx raise anything they like
        reason = quote(f"{type(error).__name__}: {error}", 300)
        raise ExportError(f"{model_dir}: the exporter failed: {reason}") from None


def _sample(model: Any, task: Task) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs to trace with, left-padded, and which of their axes are free.

    The sizes differ from each other and from every number of the config: an axis that equals
    one of those could be taken for it.
    """
    import torch

    length, past = _unlike(model.config, 2)
    axis = torch.export.Dim.AUTO
    total = length + (past if task.cache else 0)
    mask = torch.ones(BATCH, total, dtype=torch.int64)
    mask[0, :2] = 0
    ids = torch.arange(BATCH * length).reshape(BATCH, length) % 3
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, total - length :]
    known = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    inputs: dict[str, Any] = {name: known[name] for name in task.inputs}
    shapes: dict[str, Any] = {name: {0: axis, 1: axis} for name in task.inputs}
    if task.cache:
        inputs["past_key_values"] = _cache(model, past)
        layers = 2 * len(inputs["past_key_values"].layers)
        shapes["past_key_values"] = [{0: axis, 2: axis} for _ in range(layers)]
    if task.causal:
        inputs["use_cache"] = task.cache
    return inputs, shapes


def _unlike(config: Any, count: int) -> list[int]:
    taken = {value for value in config.to_dict().values() if isinstance(value, int)}
    free = (size for size in range(5, 10_000) if size not in taken)
    return [next(free) for _ in range(count)]


def _cache(model: Any, past: int) -> Any:
    """A cache of `past` random positions, in the sizes that the model's own cache has."""
    import torch
    from transformers import DynamicCache

    probe = torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        own = model(input_ids=probe, use_cache=True).past_key_values
    cache = DynamicCache(config=model.config)
    for number, layer in enumerate(own.layers):
        _, heads, _, width = layer.keys.shape
        shape = (BATCH, heads, past, width)
        cache.update(
            torch.zeros(shape, dtype=model.dtype), torch.zeros(shape, dtype=model.dtype), number
        )
    return cache


def _rename(graph: Any) -> None:
    for value in [*graph.inputs, *graph.outputs]:
        match = _CACHE_NAME.fullmatch(value.name)
        if match:
            side, layer, part = match.groups()
            stem = "past_key_values" if side == "input" else "present"
            value.name = f"{stem}.{layer}.{'key' if part == 'keys' else 'value'}"


def _clean(model: Any) -> None:
    """Drop dead and doubled nodes, and every note about the machine that traced the graph."""
    from onnx_ir.passes import common

    for step in (
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    model.metadata_props.clear()
    model.graph.name = "main_graph"


def _check_dynamic(graph: Any, task: Task) -> None:
    found = {value.name: value for value in [*graph.inputs, *graph.outputs]}
    layers = sum(name.startswith("past_key_values.") for name in found) // 2
    expected = dict.fromkeys((*task.inputs, task.output), (0, 1))
    for stem in ("past_key_values", "present") if task.cache else ():
        expected |= {
            f"{stem}.{n}.{part}": (0, 2) for n in range(layers) for part in ("key", "value")
        }
    if set(found) != set(expected) or (task.cache and not layers):
        raise ExportError(
            f"the graph has inputs and outputs {quote(sorted(found), 300)}; "
            f"expected {quote(sorted(expected), 300)}"
        )
    for name, axes in expected.items():
        fixed = [axis for axis in axes if isinstance(found[name].shape[axis], int)]
        if fixed:
            raise ExportError(f"axis {fixed[0]} of {name} was fixed at {found[name].shape}")


def _name_axes(graph: Any) -> None:
    """Readable names for the free axes; torch numbers its symbols in an order of its own."""
    import onnx_ir

    total = "past_sequence_length + sequence_length"
    cached = any(value.name.startswith("past_key_values.") for value in graph.inputs)
    for value in [*graph.inputs, *graph.outputs]:
        stem = value.name.partition(".")[0]
        names = {0: "batch_size", 1: "sequence_length"}
        if stem in ("past_key_values", "present"):
            names = {0: "batch_size", 2: "past_sequence_length" if stem != "present" else total}
        elif stem == "attention_mask" and cached:
            names[1] = total
        axes = enumerate(value.shape)
        value.shape = onnx_ir.Shape(
            [names[axis] if axis in names else _number(size) for axis, size in axes]
        )


def _number(size: Any) -> int:
    """torch writes even a fixed axis as a symbol, whose name is then the number."""
    return size if isinstance(size, int) else int(str(size.value))


def _aliases(model: Any) -> dict[str, tuple[str, ...]]:
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in by_tensor.values() for name in names}
