"""Numbers of the graph that are not the model's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.differential import mutants
from tests.localize.seeds.target import Array, Target, Truth, Unfit, rounded


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


SEEDS: dict[str, Callable[[Target], Truth]] = {
    "epsilon 10% larger": _epsilon(1.1),
    "epsilon tenfold": _epsilon(10.0),
    "rotary base": _frequencies(_base),
    "rotary in bfloat16": _frequencies(rounded),
    "attention scale": scale_scores,
    "attention softcap": _softcap("attention"),
    "final softcap": _softcap("final"),
    "embedding scale": scale_embedding,
    "window one shorter": shrink_window,
}
