"""Operators that are not the model's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests.differential import mutants
from tests.localize.seeds.target import Target, Truth, Unfit


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
        deep = re.search(r"attn|attention(?!\.output)|mlp|act|rotary|norm|ln_", scope, re.I)
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
    site = rf".*norm.*|(q|k|v|gate|up)_proj\.{target.layer}|qkv_proj\.{target.layer}"
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


SEEDS: dict[str, Callable[[Target], Truth]] = {
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
}
