"""Experts of a live transformers model: all of a layer in one module, with stacked weights."""

from __future__ import annotations

from typing import Any


def written(
    experts: Any,
    inputs: tuple[Any, ...],
    expert: int | None,
    neurons: list[int] | slice,
    *,
    gate: Any = 1,
    up: Any = 1,
    by: Any = 1,
) -> Any:
    """What `neurons` of one expert add to the output of a layer's experts [tokens, width].

    `inputs` are the module's x [tokens, width] and the router's choice, indices and weights
    [tokens, chosen]; `gate` and `up` multiply the outputs of these projections, `by` the neurons.
    """
    import torch

    x, index, weight = inputs
    gates, ups = (rows[neurons] for rows in experts.gate_up_proj[expert].chunk(2))
    activations = experts.act_fn(gate * (x @ gates.T)) * (up * (x @ ups.T))
    routed = torch.where(index == expert, weight, 0).sum(-1, keepdim=True)
    return (routed * activations * by) @ experts.down_proj[expert][:, neurons].T
