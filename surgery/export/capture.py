"""A checkpoint's computation as an ONNX graph, from its config alone.

transformers' own exporter traces a model whose parameters have sizes and no numbers. With
`optimize=False` upstream nothing is folded, transposed or merged into them, so that the graph
keeps the state-dict names of its parameters as initializer names. Buffers such as rotary
frequencies hold real values. Of many layers of one kind two are traced (see `stitch`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.arch import Architecture, identify
from surgery.checkpoint import Checkpoint
from surgery.errors import ExportError, quote
from surgery.export.axes import name_axes
from surgery.export.load import load_skeleton
from surgery.export.narrow import compute_wide
from surgery.export.quiet import quiet
from surgery.export.stitch import Layers, Unstitchable, scopes, stitch
from surgery.export.tasks import Task, find_task
from surgery.export.trace import trace

UNBOUND = "unbound"
"""The external file that parameters of a captured graph name: they have no numbers yet."""
PARAMETERS = "surgery.parameters"
"""Key in the metadata: JSON, parameter name to all names of that tensor in the model."""
PREFIX = "surgery.prefix"
"""Key in the metadata: what the model puts before its base model's names."""


def capture(
    model_dir: Path,
    task: str,
    opset: int = 20,
    dtype: str = "float32",
    *,
    whole: bool = False,
    report: Path | None = None,
) -> Any:
    """The `onnx_ir.Model` of the checkpoint's config for `task`, computing in `dtype`.

    Its parameters are external tensors of the file `UNBOUND`, which there is not. Inputs and
    outputs have optimum's names; batch, length and cache length are symbolic. With `whole` every
    layer is traced; `report` is a folder for torch's own report. Raises `ExportError` when the
    exporter fails or bakes an axis in, `CheckpointError` when no model can be made of the config.
    """
    arch = identify(Checkpoint.open(model_dir))
    wanted = find_task(task)
    if not whole:
        try:
            return _capture(model_dir, arch, wanted, opset, dtype, report, whole=False)
        except Unstitchable:
            whole = True
    return _capture(model_dir, arch, wanted, opset, dtype, report, whole=whole)


def serialized(model: Any) -> bytes:
    """A captured graph as the bytes of an ONNX protobuf: the same for the same graph."""
    import onnx_ir

    data: bytes = onnx_ir.to_proto(model).SerializeToString(deterministic=True)
    return data


def _capture(
    model_dir: Path,
    arch: Architecture,
    task: Task,
    opset: int,
    dtype: str,
    report: Path | None,
    *,
    whole: bool,
) -> Any:
    traced: list[int] = []
    kinds: list[Hashable] = []

    def shrink(config: Any) -> None:
        kinds.extend(range(arch.layers) if whole else _kinds(config, arch))
        traced.extend(_two_of_each(kinds))
        if len(traced) < arch.layers:
            _keep_layers(config, traced, arch)

    skeleton, mode = load_skeleton(model_dir, task, dtype, shrink)
    block = f"{_prefix(skeleton)}{arch.facts.block}"
    with quiet():
        model = trace(skeleton, mode, task, opset, model_dir, report)
        parameters = _aliases(skeleton)
        _unbind(model.graph, parameters, block)
        compute_wide(model.graph)
        _clean(model)
    layers = _layers(kinds, traced, block)
    try:
        model.graph = stitch(model.graph, layers, parameters)
    except Unstitchable:
        if not whole:
            raise
    every = _every_layer(parameters, layers)
    names = {name: every[name] for name in model.graph.initializers if name in every}
    _check_dynamic(model.graph, task)
    name_axes(model.graph)
    _settle_sizes(model.graph)
    with quiet():
        _clean(model)
    _name(model.graph)
    _forget(model)
    model.metadata_props[PARAMETERS] = json.dumps(names, sort_keys=True)
    model.metadata_props[PREFIX] = _prefix(skeleton)
    return model


def _kinds(config: Any, arch: Architecture) -> list[Hashable]:
    """What tells layers of one model apart, for each."""
    types = getattr(config, "layer_types", None) or [None] * arch.layers
    return [(types[layer], layer in arch.sparse) for layer in range(arch.layers)]


def _two_of_each(kinds: Sequence[Hashable]) -> list[int]:
    """The first two layers of each kind, in order."""
    return [n for n, kind in enumerate(kinds) if kinds[:n].count(kind) < 2]


def _keep_layers(config: Any, kept: Sequence[int], arch: Architecture) -> None:
    """Makes `config` that of a model which has only the layers `kept`."""
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    experts = arch.facts.experts
    if experts and experts.dense:
        dense = [new for new, layer in enumerate(kept) if layer not in arch.sparse]
        setattr(config, experts.dense, dense)
    if experts and experts.step:
        setattr(config, experts.step, 1)


def _layers(kinds: Sequence[Hashable], traced: Sequence[int], block: str) -> Layers:
    own = [kinds[layer] for layer in traced]
    second = {kind: n for n, kind in enumerate(own) if kind in own[:n]}
    return Layers(
        block,
        tuple(own.index(kind) for kind in kinds),
        tuple((own.index(kind), n) for kind, n in second.items()),
    )


def _settle_sizes(graph: Any) -> None:
    """Every size of an input is read from the first input that has it, before all else: torch
    reads it from any, in an order of its own."""
    places = _first_places(graph)
    sizes: dict[str, list[Any]] = {name: [] for name in places}
    for node in list(graph):
        start, end = _span(node)
        if end == start + 1 and str(node.inputs[0].shape[start]) in sizes:
            sizes[str(node.inputs[0].shape[start])].append(node)
    for name, old in reversed(sizes.items()):
        if old:
            _read_first(graph, *places[name], old)


def _first_places(graph: Any) -> dict[str, tuple[Any, int]]:
    """Name of a free size to the first input that has it, and on which axis."""
    places: dict[str, tuple[Any, int]] = {}
    for value in graph.inputs:
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int):
                places.setdefault(str(size), (value, axis))
    return places


def _span(node: Any) -> tuple[int, int]:
    """Which axes of a graph input a node reads the size of; none of other nodes."""
    if node.op_type != "Shape" or not node.inputs[0].is_graph_input():
        return 0, 0
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    rank = len(node.inputs[0].shape)
    return (start.as_int() if start else 0), (end.as_int() if end else rank)


def _read_first(graph: Any, value: Any, axis: int, old: Sequence[Any]) -> None:
    """One Shape of `value`, and one Squeeze of that, at the head of the graph for all of `old`."""
    import onnx_ir

    scope = {"metadata_props": dict(old[0].metadata_props)}
    shape = onnx_ir.node("Shape", [value], {"start": axis, "end": axis + 1}, **scope)
    scalar = onnx_ir.node("Squeeze", shape.outputs, **scope)
    for node in old:
        for user in list(node.outputs[0].consumers()):
            if user.op_type == "Squeeze" and len(user.inputs) == 1:
                user.outputs[0].replace_all_uses_with(scalar.outputs[0])
                graph.remove(user, safe=True)
        node.outputs[0].replace_all_uses_with(shape.outputs[0])
        graph.remove(node, safe=True)
    graph.insert_before(graph[0], [shape, scalar])


def _aliases(model: Any) -> dict[str, tuple[str, ...]]:
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in by_tensor.values() for name in names}


def _prefix(model: Any) -> str:
    """What the model puts before its base model's names; nothing where it is that model."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _unbind(graph: Any, parameters: Collection[str], block: str) -> None:
    """Parameters become placeholders; equal constants, which layers have each for itself, one."""
    seen: dict[tuple[Any, ...], Any] = {}
    for name, value in list(graph.initializers.items()):
        if name in parameters:
            value.const_value = placeholder(value)
            continue
        key = (value.dtype, tuple(value.shape), value.const_value.tobytes())
        first = seen.setdefault(key, value)
        if first is not value:
            value.replace_all_uses_with(first)
            del graph.initializers[name]
        elif name.startswith(block.partition("{")[0]):
            value.name = f"constant_{len(seen)}"


def placeholder(value: Any) -> Any:
    """The external tensor, of a file there is not, that stands for the numbers of `value`."""
    import onnx_ir

    return onnx_ir.ExternalTensor(UNBOUND, 0, None, value.dtype, shape=value.shape, name=value.name)


def _clean(model: Any) -> None:
    """Drop dead and doubled nodes."""
    from onnx_ir.passes import common

    for step in (
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ):
        step(model)


def _name(graph: Any) -> None:
    """Nodes and values are called after the module they were traced in: torch's numbers would
    differ with the layers that were traced."""
    counts: Counter[str] = Counter()
    kept = {*graph.inputs, *graph.outputs}
    for node in graph:
        stem = f"{(scopes(node) or ['graph'])[-1] or 'graph'}/{node.op_type}"
        counts[stem] += 1
        node.name = f"{stem}_{counts[stem]}"
        for number, value in enumerate(node.outputs):
            if value not in kept:
                value.name = node.name if number == 0 else f"{node.name}.{number}"


def _check_dynamic(graph: Any, task: Task) -> None:
    found = {value.name: value for value in [*graph.inputs, *graph.outputs]}
    layers = sum(name.startswith("past_key_values.") for name in found) // 2
    expected: dict[str, tuple[int, ...]] = dict.fromkeys((*task.inputs, task.output), (0, 1))
    if "position_ids" not in found:
        expected.pop("position_ids", None)
    if task.pooled and task.pooled in found:
        expected[task.pooled] = (0,)
    if task.rows:
        expected[task.output] = (0,)
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


def _forget(model: Any) -> None:
    """Drop every note about the machine that traced the graph."""
    from onnx_ir.passes import common

    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.graph.name = "main_graph"


def _every_layer(parameters: Mapping[str, Sequence[str]], layers: Layers) -> dict[str, list[str]]:
    """The names of `parameters`, of traced layers, in all layers."""
    return {
        layers.renamed(name, traced, layer): [layers.renamed(n, traced, layer) for n in names]
        for layer, traced in enumerate(layers.template)
        for name, names in parameters.items()
    }
