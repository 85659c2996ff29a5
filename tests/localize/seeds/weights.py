"""Weights that are not the checkpoint's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.localize.seeds.target import Array, Target, Truth, Unfit, rounded

Q = ("q_proj", "qkv_proj")
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


SEEDS: dict[str, Callable[[Target], Truth]] = {
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
    "bfloat16": _weight("down_proj")(lambda own, other: rounded(own)),
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
}
