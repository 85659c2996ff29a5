"""Faults to plant in a portable export of ours, each with where it truly is.

A seed changes a ModelProto that has its weights inside and says what must be found: sites of
boundaries, and the node, the constant or the tensor. Nodes are found by their operators and by the
module path that our exports put into the names of values, never by what the localisation knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.differential import mutants

Array = NDArray[Any]


class Unfit(Exception):
    """The graph has no place for this fault."""


@dataclass(frozen=True)
class Truth:
    """Where a fault is: a pattern of the sites that may be named, the values its node makes, the
    initializer, the tensors of which one is named. No sites: nothing to localise, only to catch."""

    sites: str = ""
    values: tuple[str, ...] = ()
    constant: str = ""
    tensors: tuple[str, ...] = ()


@dataclass
class Target:
    """A clean export to plant in: `tensors` is tensor to (initializer, whether it is turned),
    `roles` tensor to (role, layer), `other` reads the same family's tensors of another seed."""

    model: ModelProto
    layer: int
    tensors: dict[str, tuple[str, bool]]
    roles: dict[str, tuple[str, int | None]]
    other: Callable[[str], Array]
    sizes: dict[str, int] = field(default_factory=dict)

    # -------------------------------------------------------------------------------- nodes

    def nodes(self, *kinds: str, part: str = "", layer: bool = True) -> list[Any]:
        """Nodes of these kinds, of the layer, whose value's name has `part` in it."""
        wanted = re.compile(rf"\.{self.layer}[./]")
        return [
            node
            for node in self.model.graph.node
            if node.op_type in kinds
            and part in node.output[0]
            and (not layer or wanted.search(node.output[0]))
        ]

    def one(self, *kinds: str, part: str = "", layer: bool = True) -> Any:
        found = self.nodes(*kinds, part=part, layer=layer)
        if not found:
            raise Unfit
        return found[0]

    def maker(self, value: str) -> Any:
        return next((node for node in self.model.graph.node if value in node.output), None)

    def readers(self, value: str) -> list[Any]:
        return [node for node in self.model.graph.node if value in node.input]

    def softmax(self) -> Any:
        """The layer's attention: the softmax that a product reads."""
        for node in self.nodes("Softmax"):
            if any(reader.op_type == "MatMul" for reader in self.readers(node.output[0])):
                return node
        raise Unfit

    def scores(self) -> Any:
        """The product of queries and keys."""
        node = self.softmax()
        while node is not None and node.op_type != "MatMul":
            node = self.maker(node.input[0])
        if node is None:
            raise Unfit
        return node

    def sort(self) -> None:
        """Every node after those it reads."""
        nodes, made = list(self.model.graph.node), set[str]()
        later = {name for node in nodes for name in node.output}
        ordered: list[Any] = []
        while nodes:
            ready = [n for n in nodes if not (set(n.input) & later) - made]
            made |= {name for node in ready for name in node.output}
            ordered += ready
            nodes = [node for node in nodes if node not in ready]
        del self.model.graph.node[:]
        self.model.graph.node.extend(ordered)

    def insert(self, value: str, kind: str, *others: str, **attributes: Any) -> str:
        """One more node after `value`, which all its readers read instead; its own value."""
        new = f"{value}.{kind}"
        mutants._redirect(self.model, value, new)
        node = helper.make_node(kind, [value, *others], [new], name=new, **attributes)
        nodes = list(self.model.graph.node)
        place = 1 + next(n for n, each in enumerate(nodes) if value in each.output)
        self.model.graph.node.insert(place, node)
        return new

    # ------------------------------------------------------------------------------ weights

    def tensor(self, *roles: str, kind: str = "weight") -> str:
        """The layer's tensor of the first of `roles` that the model has."""
        for role in roles:
            for name, (own, layer) in self.roles.items():
                alike = own == role and layer in (self.layer, None) and name.endswith(kind)
                if alike and name in self.tensors:
                    return name
        raise Unfit

    def read(self, tensor: str) -> Array:
        """The weight as the checkpoint has it."""
        name, turned = self.tensors[tensor]
        values = mutants.weight(self.model, name)
        return np.ascontiguousarray(values.T) if turned else values

    def write(self, tensor: str, values: Array) -> Truth:
        name, turned = self.tensors[tensor]
        mutants.put(self.model, name, values.T if turned else values)
        return self.truth_of(tensor)

    def truth_of(self, tensor: str) -> Truth:
        role, layer = self.roles[tensor]
        return Truth(re.escape(role if layer is None else f"{role}.{layer}"), tensors=(tensor,))

    def constant(self, name: str, values: Array, sites: str) -> Truth:
        if name not in {tensor.name for tensor in self.model.graph.initializer}:
            raise Unfit
        mutants.put(self.model, name, values)
        return Truth(sites, constant=name)

    def times(self, name: str, factor: float, sites: str) -> Truth:
        values = mutants.weight(self.model, name)
        return self.constant(name, values * values.dtype.type(factor), sites)

    def is_constant(self, name: str) -> bool:
        return any(name == tensor.name for tensor in self.model.graph.initializer)

    @property
    def attention(self) -> str:
        return rf"o_proj\.{self.layer} input"

    @property
    def everywhere(self) -> str:
        """Where a fault of all layers' attention comes in."""
        return r"o_proj\.\d+ input"

    @property
    def mlp(self) -> str:
        dense = ("down_proj", self.layer) in self.roles.values()
        return rf"down_proj\.{self.layer} input" if dense else self.stream

    @property
    def stream(self) -> str:
        return r"stream before .*"


# ------------------------------------------------------------------------------------- weights

Q = ("q_proj", "qkv")
UP = ("up_proj", "gate_up_proj")


def _weight(*roles: str, kind: str = "weight") -> Callable[..., Callable[[Target], Truth]]:
    def seed(how: Callable[[Array, Array], Array]) -> Callable[[Target], Truth]:
        def plant(target: Target) -> Truth:
            name = target.tensor(*roles, kind=kind)
            before = target.read(name)
            after = how(before.copy(), target.other(name)).astype(before.dtype)
            if np.array_equal(before, after):
                raise Unfit
            return target.write(name, after)

        return plant

    return seed


def _row(values: Array, other: Array) -> Array:
    values[len(values) // 2] = other[len(values) // 2]
    return values


def _column(values: Array, other: Array) -> Array:
    values[:, values.shape[1] // 2] = other[:, values.shape[1] // 2]
    return values


def _turned(values: Array, other: Array) -> Array:
    if values.shape[0] != values.shape[1]:
        raise Unfit
    return values.T.copy()


def _int8(values: Array, other: Array) -> Array:
    scale = np.abs(values).max() / 127
    return np.round(values / scale) * scale


def _bit(values: Array, other: Array) -> Array:
    values.reshape(-1)[7:8].view(np.uint32)[:] ^= 1 << 25
    return values


def _element(values: Array, other: Array) -> Array:
    values.reshape(-1)[5] += 0.05
    return values


def _half(values: Array, other: Array) -> Array:
    values.reshape(-1)[values.size // 2 :] = 0
    return values


def lose_head(target: Target) -> Truth:
    name = target.tensor("o_proj")
    values = target.read(name)
    size = values.shape[1] // target.sizes["heads"]
    values[:, -size:] = 0
    return target.write(name, values)


def swap_layers(target: Target) -> Truth:
    """Both layers' tensors are in each other's place."""
    name = target.tensor("down_proj")
    others = [n for n, (role, _) in target.roles.items() if role == "down_proj" and n != name]
    twin = next((n for n in others if n.endswith("weight") and n in target.tensors), None)
    if twin is None:
        raise Unfit
    one, two = target.read(name), target.read(twin)
    target.write(twin, one)
    target.write(name, two)
    return Truth(r"down_proj\.\d+", tensors=(name, twin))


def zero_token(target: Target) -> Truth:
    """One token's embedding; a tied head has the same row."""
    name = target.tensor("embed")
    values = target.read(name)
    values[target.sizes["vocab"] // 2] = 0
    return Truth("embed|lm_head|stream.*", tensors=target.write(name, values).tensors)


def shift_positions(target: Target) -> Truth:
    name = target.tensor("position_embed")
    return target.write(name, np.roll(target.read(name), 1, axis=0))


# ----------------------------------------------------------------------------------- constants


def _epsilon(factor: float) -> Callable[[Target], Truth]:
    def plant(target: Target) -> Truth:
        for node in target.model.graph.node:
            if node.op_type == "Sqrt":
                added = target.maker(node.input[0])
                for name in added.input if added is not None and added.op_type == "Add" else ():
                    if target.is_constant(name):
                        values = mutants.weight(target.model, name)
                        return target.constant(
                            name, values * values.dtype.type(factor), r".*norm.*"
                        )
        nodes = target.nodes("LayerNormalization", layer=False)
        if not nodes:
            raise Unfit
        for node in nodes:
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f *= factor
        return Truth(r".*norm.*", tuple(node.output[0] for node in nodes))

    return plant


def _frequencies(how: Callable[[Array], Array]) -> Callable[[Target], Truth]:
    def plant(target: Target) -> Truth:
        for tensor in target.model.graph.initializer:
            if "inv_freq" in tensor.name:
                values = how(mutants.weight(target.model, tensor.name)).astype(np.float32)
                return target.constant(tensor.name, values, target.everywhere)
        raise Unfit

    return plant


def _base(values: Array) -> Array:
    count = values.size
    return (50000.0 ** (-np.arange(count) / count)).reshape(values.shape)


def _bf16(values: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def scale_scores(target: Target) -> Truth:
    """The factor on queries and keys 1% too large, for all layers that share it."""
    node = target.scores()
    for side in (*[target.maker(name) for name in node.input], *target.readers(node.output[0])):
        if side is not None and side.op_type in ("Mul", "Div"):
            for name in side.input:
                if target.is_constant(name):
                    values = mutants.weight(target.model, name)
                    return target.constant(
                        name, values * values.dtype.type(1.01), target.everywhere
                    )
    raise Unfit


def _softcap(where: str) -> Callable[[Target], Truth]:
    def plant(target: Target) -> Truth:
        final = where == "final"
        part = "" if final else "attn"
        nodes = target.nodes("Tanh", part=part, layer=not final)
        nodes = [n for n in nodes if not final or n.output[0].startswith("graph/")]
        if not nodes:
            raise Unfit
        name = target.maker(nodes[0].input[0]).input[1]
        return target.times(name, 0.6, "logits" if final else target.everywhere)

    return plant


def scale_embedding(target: Target) -> Truth:
    for tensor in target.model.graph.initializer:
        if "embed_scale" in tensor.name:
            return target.times(tensor.name, 1.003, r"stream.*|embed")
    raise Unfit


def shrink_window(target: Target) -> Truth:
    """A sliding window of one position less."""
    for node in target.model.graph.node:
        if node.op_type == "Greater":
            less = target.maker(node.input[1])
            if less is not None and less.op_type == "Sub" and target.is_constant(less.input[1]):
                values = mutants.weight(target.model, less.input[1])
                return target.constant(less.input[1], values - 1, target.everywhere)
    raise Unfit


# --------------------------------------------------------------------------------------- graph


def _kind(node: Any, kind: str, sites: str) -> Truth:
    node.op_type = kind
    return Truth(sites, (node.output[0],))


def mask_off_by_one(target: Target) -> Truth:
    return _kind(target.one("LessOrEqual", layer=False), "Less", target.everywhere)


def look_ahead(target: Target) -> Truth:
    node = target.one("LessOrEqual", layer=False)
    mutants.look_ahead(target.model)
    return Truth(target.everywhere, (node.output[0],))


def ignore_mask(target: Target) -> Truth:
    mutants.ignore_mask(target.model)
    return Truth(target.everywhere, ("mask.ones", "mask.shape"))


def softmax_axis(target: Target) -> Truth:
    node = target.softmax()
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", -2))
    return Truth(target.attention, (node.output[0],))


def _residual(target: Target) -> Any:
    """An addition of two values that no weight's bias is in, in the layer's own scope."""
    for node in target.nodes("Add"):
        weights = any(target.is_constant(name) for name in node.input)
        makers = [target.maker(name) for name in node.input]
        kinds = {m.op_type for m in makers if m is not None}
        scope = node.output[0].rpartition("/")[0]
        deep = re.search(r"attn|attention\.self|mlp|act|rotary|norm|ln_", scope, re.I)
        if not weights and not deep and kinds:
            return node
    raise Unfit


def lose_residual(target: Target) -> Truth:
    """What a block gives in place of the sum."""
    node = _residual(target)
    del node.input[0]
    return _kind(node, "Identity", target.stream)


def subtract_residual(target: Target) -> Truth:
    return _kind(_residual(target), "Sub", target.stream)


def other_activation(target: Target) -> Truth:
    for node in target.nodes("Gelu"):
        mine = [a.s for a in node.attribute if a.name == "approximate"]
        del node.attribute[:]
        other = "none" if mine == [b"tanh"] else "tanh"
        node.attribute.append(helper.make_attribute("approximate", other))
        return Truth(target.mlp, (node.output[0],))
    for kind, other in (("Sigmoid", "HardSigmoid"), ("Relu", "Elu"), ("Erf", "Tanh")):
        for node in target.nodes(kind):
            return _kind(node, other, target.mlp)
    raise Unfit


def no_activation(target: Target) -> Truth:
    for node in target.nodes("Gelu", "Sigmoid", "Relu", "Erf"):
        del node.attribute[:]
        return _kind(node, "Identity", target.mlp)
    for node in target.nodes("Tanh", part="mlp"):
        return _kind(node, "Identity", target.mlp)
    raise Unfit


def rotate_sign(target: Target) -> Truth:
    return _kind(target.one("Neg"), "Identity", target.attention)


def rotate_order(target: Target) -> Truth:
    neg = target.one("Neg")
    for node in target.readers(neg.output[0]):
        if node.op_type == "Concat":
            node.input[:] = list(node.input)[::-1]
            return Truth(target.attention, (node.output[0],))
    raise Unfit


def cosine_for_sine(target: Target) -> Truth:
    return _kind(target.one("Sin", layer=False), "Cos", target.everywhere)


def head_order(target: Target) -> Truth:
    """Grouped keys repeated head by head in turn, and not each in a row."""
    for node in target.nodes("Expand"):
        unsqueeze = target.maker(node.input[0])
        if unsqueeze is not None and unsqueeze.op_type == "Unsqueeze":
            perm = [0, 2, 1, 3, 4]
            value = target.insert(node.output[0], "Transpose", perm=perm)
            return Truth(target.attention, (value, *_after(target, value)))
    raise Unfit


def _after(target: Target, value: str) -> tuple[str, ...]:
    return tuple(name for node in target.readers(value) for name in node.output)


def head_layout(target: Target) -> Truth:
    """Heads joined in another order than the output projection has them."""
    node = target.softmax()
    for _ in range(8):
        after = target.readers(node.output[0])
        if not after:
            break
        node = after[0]
        if node.op_type == "Transpose":
            node.attribute[0].ints[:] = [0, 2, 3, 1]
            return Truth(target.attention, (node.output[0],))
    raise Unfit


def no_scale(target: Target) -> Truth:
    """Queries go unscaled."""
    for name in target.scores().input:
        node = target.maker(name)
        if node is not None and node.op_type == "Mul":
            del node.input[1]
            return _kind(node, "Identity", target.attention)
    raise Unfit


def swap_gate(target: Target) -> Truth:
    """The activation on the projection that should go without."""
    weights = [target.tensors[target.tensor(role)][0] for role in ("gate_proj", "up_proj")]
    one, two = (_after(target, weight)[0] for weight in weights)
    other = {one: two, two: one}
    readers = [node for node in target.model.graph.node if set(node.input) & {one, two}]
    for node in readers:
        node.input[:] = [other.get(name, name) for name in node.input]
    values = tuple(node.output[0] for node in readers)
    target.sort()
    return Truth(target.mlp, values)


def _norm(target: Target) -> Any:
    for node in target.nodes("LayerNormalization"):
        return node
    return target.one("Reciprocal")


def no_norm(target: Target) -> Truth:
    node = _norm(target)
    site = rf".*norm.*|(q|k|v|gate|up)_proj\.{target.layer}|qkv\.{target.layer}"
    del node.attribute[:], node.input[1:]
    return _kind(node, "Identity", site)


def _through(kind: str) -> Callable[[Target], Truth]:
    """Rounded in between, where the layer's attention has been normalised."""

    def plant(target: Target) -> Truth:
        value = target.softmax().output[0]
        if kind == "float16":
            mid = target.insert(value, "Cast", to=TensorProto.FLOAT16)
            last = target.insert(mid, "Cast", to=TensorProto.FLOAT)
            return Truth(target.attention, (mid, last))
        rest = [f"{value}.scale", f"{value}.zero"]
        for name, array in zip(rest, (np.float32(1 / 255), np.uint8(0)), strict=True):
            target.model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        mid = target.insert(value, "QuantizeLinear", *rest)
        last = target.insert(mid, "DequantizeLinear", *rest)
        return Truth(target.attention, (mid, last))

    return plant


def late_positions(target: Target) -> Truth:
    """Every position one too large."""
    inputs = {value.name for value in target.model.graph.input}
    if "position_ids" not in inputs:
        raise Unfit
    one = numpy_helper.from_array(np.array(1, np.int64), "positions.one")
    target.model.graph.initializer.append(one)
    mutants._redirect(target.model, "position_ids", "positions.late")
    node = helper.make_node("Add", ["position_ids", "positions.one"], ["positions.late"])
    mutants._prepend(target.model, node)
    return Truth(rf"{target.everywhere}|pos.*|stream.*", ("positions.late",))


def ignore_positions(target: Target) -> Truth:
    inputs = {value.name for value in target.model.graph.input}
    if "position_ids" not in inputs:
        raise Unfit
    mutants.ignore_positions(target.model)
    return Truth(rf"{target.everywhere}|pos.*|stream.*", ("positions.own", "positions.ones"))


# ----------------------------------------------------------------------------------- interface


def _whole(how: Callable[[ModelProto], None]) -> Callable[[Target], Truth]:
    def plant(target: Target) -> Truth:
        how(target.model)
        return Truth()

    return plant


def _cut(model: ModelProto) -> None:
    sizes = model.graph.output[0].type.tensor_type.shape.dim
    mutants.cut_features(model, sizes[2].dim_value - 1 if sizes[2].dim_value else 7)


SEEDS: dict[str, dict[str, Callable[[Target], Truth]]] = {
    "weight": {
        "stale": _weight(*Q)(lambda own, other: other),
        "stale bias": _weight(*Q, "up_proj", kind="bias")(lambda own, other: other),
        "swapped between layers": swap_layers,
        "transposed": _weight("o_proj")(_turned),
        "one row stale": _weight(*UP)(_row),
        "one column stale": _weight("down_proj")(_column),
        "head lost": lose_head,
        "half zero": _weight("down_proj")(_half),
        "zero": _weight("o_proj")(lambda own, other: np.zeros_like(own)),
        "8-bit": _weight(*UP)(_int8),
        "bfloat16": _weight("down_proj")(lambda own, other: _bf16(own)),
        "float16": _weight(*Q)(lambda own, other: own.astype(np.float16)),
        "bit flipped": _weight("o_proj")(_bit),
        "scaled 0.2%": _weight("down_proj")(lambda own, other: own * np.float32(1.002)),
        "one element": _weight(*UP)(_element),
        "rows one off": _weight("o_proj")(lambda own, other: np.roll(own, 1, 0)),
        "stale norm": _weight("mlp_norm", "input_norm")(lambda own, other: other),
        "norm weight one": _weight("input_norm", "attention_norm")(
            lambda own, other: np.ones_like(own)
        ),
        "one token lost": zero_token,
        "stale head": _weight("lm_head")(lambda own, other: other),
        "position table one off": shift_positions,
    },
    "constant": {
        "epsilon 10% larger": _epsilon(1.1),
        "epsilon tenfold": _epsilon(10.0),
        "rotary base": _frequencies(_base),
        "rotary in bfloat16": _frequencies(_bf16),
        "attention scale": scale_scores,
        "attention softcap": _softcap("attention"),
        "final softcap": _softcap("final"),
        "embedding scale": scale_embedding,
        "window one shorter": shrink_window,
    },
    "graph": {
        "mask off by one": mask_off_by_one,
        "later tokens seen": look_ahead,
        "padding seen": ignore_mask,
        "softmax axis": softmax_axis,
        "residual lost": lose_residual,
        "residual subtracted": subtract_residual,
        "another activation": other_activation,
        "activation lost": no_activation,
        "rotate without sign": rotate_sign,
        "rotate halves swapped": rotate_order,
        "cosine for sine": cosine_for_sine,
        "grouped heads interleaved": head_order,
        "heads joined otherwise": head_layout,
        "scale lost": no_scale,
        "gate and up exchanged": swap_gate,
        "norm lost": no_norm,
        "float16 in between": _through("float16"),
        "8 bits in between": _through("int8"),
        "positions one off": late_positions,
        "positions count padding": ignore_positions,
    },
    "interface": {
        "another output": _whole(mutants.pool_output),
        "one feature less": _whole(_cut),
        "float16 output": _whole(mutants.to_float16),
        "output through float16": _whole(mutants.through_float16),
        "batch baked in": _whole(lambda m: mutants.add(m, np.zeros((2, 1, 1)))),
        "length baked in": _whole(lambda m: mutants.add(m, np.zeros((1, 7, 1)))),
        "impossible shape": _whole(lambda m: mutants.reshape(m, [7, 11, 13])),
        "NaN everywhere": _whole(mutants.nan_everywhere),
        "NaN in padded batches": _whole(mutants.nan_in_padded_batches),
        "NaN under padding": _whole(mutants.nan_at_padding),
        "ids through int8": _whole(mutants.narrow_ids),
    },
}
"""By class, then by what is wrong."""


def names() -> Iterator[tuple[str, str]]:
    """Class and name of every seed."""
    for kind, seeds in SEEDS.items():
        yield from ((kind, name) for name in seeds)
