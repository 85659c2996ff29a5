"""What an ONNX graph wants to be fed, what it gives back, and where its embedding lookup is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import OnnxError, quote
from surgery.runtimes.interface import Arrays, IdArrays

ROLES = ("input_ids", "attention_mask", "position_ids")
ZEROS = "token_type_ids"
CACHE = "cache"
PRESENT = "present."
_PAST = re.compile(r"past_key_values\.(\d+\.(?:key|value))")
_PASS_THROUGH = ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten")


@dataclass(frozen=True)
class Port:
    """One declared graph input: numpy `dtype`, `shape` with None for free axes."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    @property
    def is_ids(self) -> bool:
        return self.dtype.kind == "i" and len(self.shape) == 2

    @property
    def is_cache(self) -> bool:
        sizes = self.shape[1:4:2]
        return self.dtype.kind == "f" and len(self.shape) == 4 and None not in sizes

    def __str__(self) -> str:
        return f"{quote(self.name)} {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Link:
    """One cache: the input that reads it, the output that continues it, empty where the graph has
    none, and optimum's name for that output."""

    past: str
    present: str
    name: str


@dataclass(frozen=True)
class Signature:
    """What a graph is fed, what its caches are, and the `output` that is compared."""

    ports: tuple[Port, ...]
    roles: dict[str, str]
    links: tuple[Link, ...]
    output: str

    @property
    def continues(self) -> bool:
        """Whether one run can go on from another: every cache that is read is written too."""
        return bool(self.links) and all(link.present for link in self.links)


def signature(model: Any, output: str, file: str) -> Signature:
    """The signature of a ModelProto; raises `OnnxError` for inputs that cannot be fed."""
    declared = ports(model)
    roles = assign_roles(declared, file)
    caches = [name for name, role in roles.items() if role == CACHE]
    return Signature(declared, roles, _links(model, caches, file), output)


def has_cache(model: Any) -> bool:
    """Whether a ModelProto reads a key-value cache, or writes one under optimum's names."""
    writes = any(value.name.startswith(PRESENT) for value in model.graph.output)
    return writes or any(port.is_cache for port in ports(model))


def _links(model: Any, caches: Sequence[str], file: str) -> tuple[Link, ...]:
    """`past_key_values.N.key` is continued by `present.N.key`, or, where one such name is there, by
    nothing if it is not: who goes by names finds no other. Where all names are others, the outputs
    of rank 4 continue the caches in the graph's order: layer by layer, key and value."""
    names = _presents(caches)
    given = {value.name for value in model.graph.output}
    if not caches or given & set(names):
        presents = [name if name in given else "" for name in names]
        return tuple(map(Link, caches, presents, names))
    outputs = [v.name for v in model.graph.output if len(v.type.tensor_type.shape.dim) == 4]
    if len(outputs) != len(caches):
        raise OnnxError(
            f"{file}: reads {len(caches)} caches and writes {len(outputs)}, as outputs [batch, "
            f"heads, length, size]; expected as many, such as {quote(names[0])}"
        )
    return tuple(map(Link, caches, outputs, names))


def _presents(caches: Sequence[str]) -> list[str]:
    """Optimum's names of what continues `caches`: by theirs, or else by their order."""
    if all(map(_PAST.fullmatch, caches)):
        return [_PAST.sub(rf"{PRESENT}\1", name) for name in caches]
    return [f"{PRESENT}{n // 2}.{('key', 'value')[n % 2]}" for n in range(len(caches))]


def ports(model: Any) -> tuple[Port, ...]:
    """The inputs of a ModelProto that are not initializers."""
    from onnx import helper

    weights = {tensor.name for tensor in model.graph.initializer}
    found = []
    for value in model.graph.input:
        if value.name not in weights:
            kind = value.type.tensor_type
            axes = kind.shape.dim
            shape = tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in axes)
            if not kind.elem_type:
                raise OnnxError(f"graph input {quote(value.name)} is not a tensor")
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            found.append(Port(value.name, np.dtype(dtype), shape))
    return tuple(found)


def assign_roles(declared: Iterable[Port], file: str) -> dict[str, str]:
    """Port name to what it is fed: one of `ROLES`, `ZEROS` or `CACHE`.

    Known names keep their meaning. Other integer [batch, length] inputs are taken, in the
    graph's order, for those of ids, mask and positions that no name claims. Raises `OnnxError`
    for an input that is neither, or without any token ids.
    """
    declared = list(declared)
    named = {port.name for port in declared}
    free = [role for role in ROLES if role not in named]
    roles = {}
    for port in declared:
        if port.name in ROLES or port.name == ZEROS:
            roles[port.name] = port.name
        elif port.is_cache:
            roles[port.name] = CACHE
        elif port.is_ids and free:
            roles[port.name] = free.pop(0)
        else:
            raise OnnxError(
                f"{file}: cannot feed input {port}; expected {', '.join(ROLES)}, {ZEROS} or "
                "past_key_values.N.key|value [batch, heads, length, size]"
            )
    if "input_ids" not in roles.values():
        found = ", ".join(map(str, declared)) or "none"
        raise OnnxError(
            f"{file}: expected token ids, integer [batch, length]; found inputs {found}"
        )
    return roles


def infer(
    graph: Signature, run: Callable[[Arrays], Arrays], inputs: IdArrays, split: int
) -> Arrays:
    """The named outputs of `run`, by optimum's names: all columns at once, or with a `split` and
    caches that continue the columns before it first and then the others over the cache of those."""
    if not (split and graph.continues):
        return name_outputs(graph, run(feed(graph.ports, graph.roles, inputs)))
    before = {name: array[:, :split] for name, array in inputs.items()}
    after = {name: array[:, split:] for name, array in inputs.items()}
    after["attention_mask"] = inputs["attention_mask"]
    first = run(feed(graph.ports, graph.roles, before))
    past = {link.past: first[link.present] for link in graph.links}
    then = name_outputs(graph, run(feed(graph.ports, graph.roles, after, past)))
    named = name_outputs(graph, first)
    # The caches of the second run hold the first one's.
    return {name: _joined(name, named, array, graph) for name, array in then.items()}


def _joined(name: str, first: Arrays, then: NDArray[Any], graph: Signature) -> NDArray[Any]:
    """Both runs' `output` along the length; of an unlike shape only the second's, to be told."""
    if name != graph.output or name not in first:
        return then
    one = first[name]
    alike = one.ndim == then.ndim >= 2 and one.shape[2:] == then.shape[2:]
    return np.concatenate([one, then], axis=1) if alike and len(one) == len(then) else then


def feed(
    declared: Iterable[Port],
    roles: dict[str, str],
    inputs: IdArrays,
    past: Mapping[str, NDArray[Any]] | None = None,
) -> Arrays:
    """The arrays for `declared`; without `past` caches are empty: [batch, heads, 0, size]."""
    batch = inputs["input_ids"].shape[0]
    arrays: Arrays = {}
    for port in declared:
        role = roles[port.name]
        if role == CACHE and past is not None:
            arrays[port.name] = past[port.name].astype(port.dtype, copy=False)
        elif role == CACHE:
            shape = (batch, port.shape[1] or 0, 0, port.shape[3] or 0)
            arrays[port.name] = np.zeros(shape, port.dtype)
        elif role == ZEROS:
            arrays[port.name] = np.zeros(inputs["input_ids"].shape, port.dtype)
        else:
            arrays[port.name] = inputs[role].astype(port.dtype)
    return arrays


def name_outputs(graph: Signature, found: Arrays) -> Arrays:
    """Outputs by optimum's names; where none is called `output`, the first one of rank 3 is.

    A graph with neither simply lacks that output: the caller reports it missing.
    """
    names = {link.present: link.name for link in graph.links}
    if graph.output not in found:
        near = [name for name, array in found.items() if array.ndim == 3]
        names |= dict.fromkeys(near[:1], graph.output)
    return {names.get(name, name): array for name, array in found.items()}


def cut_after_embedding(model: Any, roles: dict[str, str], file: str) -> Any:
    """A ModelProto of the token lookup alone: token ids to embedding rows in float32.

    The lookup is the first Gather along axis 0 of a float [V, d] initializer by indices that
    come from the token ids through casts and reshapes alone, which stay. Other graph inputs stay
    where a reshape takes its sizes from them. Raises `OnnxError` if there is no such Gather.
    """
    ids = next(name for name, role in roles.items() if role == "input_ids")
    makers = {name: node for node in model.graph.node for name in node.output}
    tables = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    for node in model.graph.node:
        if node.op_type != "Gather" or any(a.name == "axis" and a.i for a in node.attribute):
            continue
        table, indices = (_origin(name, makers) for name in node.input)
        if table in tables and indices == ids:
            return _ending_at(model, node.output[0], makers)
    raise OnnxError(f"{file}: no Gather of a [V, d] initializer by {quote(ids)} found")


def lookup_feed(cut: Any, roles: dict[str, str], ids: NDArray[np.int64]) -> Arrays:
    """What `cut_after_embedding`'s model is fed to look up `ids` [n]: one unpadded row."""
    row = ids[None, :]
    positions = np.arange(len(ids), dtype=np.int64)[None, :]
    inputs = {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": positions}
    return feed(ports(cut), roles, inputs)


def _origin(name: str, makers: dict[str, Any]) -> str:
    while name in makers and makers[name].op_type in _PASS_THROUGH:
        name = makers[name].input[0]
    return name


def _ending_at(model: Any, output: str, makers: dict[str, Any]) -> Any:
    from onnx import TensorProto, helper

    wanted, queue = set(), [output]
    while queue:
        name = queue.pop()
        if name not in wanted:
            wanted.add(name)
            queue += makers[name].input if name in makers else []
    graph = helper.make_graph(
        [node for node in model.graph.node if wanted & set(node.output)],
        "embedding",
        [value for value in model.graph.input if value.name in wanted],
        # Cast to float32 below: the table may be of another float type.
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, None)],
        [tensor for tensor in model.graph.initializer if tensor.name in wanted],
    )
    cast = helper.make_node("Cast", [output], ["rows"], to=TensorProto.FLOAT)
    graph.node.append(cast)
    cut = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    cut.functions.extend(model.functions)
    return cut
