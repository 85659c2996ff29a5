"""A model without numbers through transformers' exporter: sample inputs in, an ONNX graph out."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery.errors import ExportError
from surgery.export.failures import locate
from surgery.export.load import forward_inputs
from surgery.export.tasks import Task

BATCH = 2

_CACHE_NAME = re.compile(r"(input|output)\.past_key_values\.layers\.(\d+)\.(keys|values)")


def trace(
    skeleton: Any, mode: Any, task: Task, opset: int, source: Path, report: Path | None = None
) -> Any:
    """The `onnx_ir.Model` of a skeleton as exported, with optimum's names of inputs and outputs.

    `mode` is the one the skeleton's parameters live in, `source` the folder its config is from;
    with `report`, torch writes its own report into that folder, also of a failure. Raises
    `ExportError`, which names the stage, the module and the operator at fault.
    """
    try:
        with _reporting(report):
            model = _export(skeleton, mode, task, opset)
    except Exception as error:  # torch.export and torch.onnx raise anything they like
        raise ExportError(f"{source}: the export {locate(error, skeleton)}") from None
    _rename(model.graph)
    return model


def exported_program(model: Any, task: Task, opset: int, source: Path) -> Any:
    """The `torch.export.ExportedProgram` of a live model that `trace` would have translated.

    Its inputs are those of the graph, in order. Raises `ExportError` as `trace` does.
    """
    try:
        with _stopped():
            _export(model, contextlib.nullcontext(), task, opset)
    except _Exported as reached:
        return reached.program
    except Exception as error:  # torch.export raises anything it likes
        raise ExportError(f"{source}: the export {locate(error, model)}") from None
    raise ExportError(f"{source}: the export never came to torch.onnx.export")


def _export(model: Any, mode: Any, task: Task, opset: int) -> Any:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    inputs, shapes = _sample(model, mode, task)
    config = OnnxConfig(dynamic=True, optimize=False, opset_version=opset, dynamic_shapes=shapes)
    return OnnxExporter().export(model, inputs, config).program


class _Exported(Exception):
    """An export that has come to where the captured program is translated."""

    def __init__(self, program: Any) -> None:
        super().__init__("captured")
        self.program = program


@contextlib.contextmanager
def _stopped() -> Iterator[None]:
    """While entered, `torch.onnx.export` raises `_Exported` with what it was to translate."""
    import torch

    def stop(program: Any, *args: Any, **named: Any) -> Any:
        raise _Exported(program)

    export, instead = torch.onnx.export, functools.partial(stop)
    torch.onnx.export = instead
    try:
        yield
    finally:
        torch.onnx.export = export


@contextlib.contextmanager
def _reporting(folder: Path | None) -> Iterator[None]:
    """While entered, `torch.onnx.export` writes its report into `folder`, if there is one."""
    import torch

    export = torch.onnx.export
    if folder is not None:
        torch.onnx.export = functools.partial(export, report=True, artifacts_dir=folder)
    try:
        yield
    finally:
        torch.onnx.export = export


def _sample(model: Any, mode: Any, task: Task) -> tuple[dict[str, Any], dict[str, Any]]:
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
    inputs: dict[str, Any] = {name: known[name] for name in forward_inputs(model, task)}
    shapes: dict[str, Any] = {name: {0: axis, 1: axis} for name in inputs}
    if task.cache:
        inputs["past_key_values"] = _cache(model, mode, past)
        layers = 2 * len(inputs["past_key_values"].layers)
        shapes["past_key_values"] = [{0: axis, 2: axis} for _ in range(layers)]
    if task.causal:
        inputs["use_cache"] = task.cache
    return inputs, shapes


def _unlike(config: Any, count: int) -> list[int]:
    taken = {value for value in config.to_dict().values() if isinstance(value, int)}
    free = (size for size in range(5, 10_000) if size not in taken)
    return [next(free) for _ in range(count)]


def _cache(model: Any, mode: Any, past: int) -> Any:
    """A cache of `past` positions, in the sizes that the model's own cache has.

    Its layers keep every position: what a sliding window hides is hidden by the mask.
    """
    import torch
    from transformers import DynamicCache
    from transformers.exporters.exporter_onnx import use_experts_implementation

    # Kernels that multiply experts in groups are not for tensors without numbers.
    with mode, torch.no_grad(), use_experts_implementation(model, "batched_mm"):
        probe = torch.zeros(1, 1, dtype=torch.int64)
        own = model(input_ids=probe, use_cache=True).past_key_values
    cache = DynamicCache()
    for number, layer in enumerate(own.layers):
        _, heads, _, width = layer.keys.shape
        keys, values = (torch.zeros(BATCH, heads, past, width, dtype=model.dtype) for _ in "kv")
        cache.update(keys, values, number)
    return cache


def _rename(graph: Any) -> None:
    for value in [*graph.inputs, *graph.outputs]:
        match = _CACHE_NAME.fullmatch(value.name)
        if match:
            side, layer, part = match.groups()
            stem = "past_key_values" if side == "input" else "present"
            value.name = f"{stem}.{layer}.{'key' if part == 'keys' else 'value'}"
