"""Which heads and neurons a model has: addresses outside it are refused with what there is."""

from __future__ import annotations

from collections.abc import Mapping

from surgery.addresses import Head, Neuron
from surgery.errors import EditError


def check_head(head: Head, family: str, sizes: Mapping[str, int]) -> None:
    """Raises `EditError` for a head the model does not have."""
    _check_layer(head, family, sizes)
    _check(str(head), "head", head.head, sizes["heads"], family)


def check_neuron(
    neuron: Neuron, family: str, sizes: Mapping[str, int], sparse: frozenset[int]
) -> None:
    """Raises `EditError` for a neuron the model does not have; `sparse` layers have experts."""
    _check_layer(neuron, family, sizes)
    layer = f"{neuron}: layer {neuron.layer} of this {family} model"
    if neuron.expert is None:
        if neuron.layer in sparse:
            expected = Neuron(neuron.layer, neuron.neuron, 0)
            raise EditError(f"{layer} has experts; expected an address like {expected}")
        _check(str(neuron), "neuron", neuron.neuron, sizes["mlp_width"], family)
        return
    if neuron.layer not in sparse:
        expected = Neuron(neuron.layer, neuron.neuron)
        raise EditError(f"{layer} has no experts; expected an address like {expected}")
    _check(str(neuron), "expert", neuron.expert, sizes["experts"], family)
    _check(str(neuron), "neuron", neuron.neuron, sizes["expert_width"], family)


def _check_layer(address: Head | Neuron, family: str, sizes: Mapping[str, int]) -> None:
    if address.layer >= sizes["layers"]:
        raise EditError(
            f"{address}: layer {address.layer} is out of range; this {family} model has layers "
            f"0 to {sizes['layers'] - 1}"
        )


def _check(address: str, noun: str, index: int, count: int, family: str) -> None:
    if index >= count:
        raise EditError(
            f"{address}: {noun} {index} is out of range; this {family} model has {noun}s "
            f"0 to {count - 1} in each layer"
        )
