"""What removing one component of what a head writes does to the margin, to first order.

A head adds z·W_O to the stream at every position; with component i of W_OV scaled to 0 it adds
(z·W_O·v_i)·v_iᵀ less. With g the gradient of the margin by what the attention adds, the margin
changes by −Σ over positions of (z·W_O·v_i)(g·v_i), all that follows (later attention, MLPs, norms)
being followed to first order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.find.interface import Lab
from surgery.find.prompts.rows import inputs_of, pieces
from surgery.find.prompts.watched import Watched
from surgery.find.scores.circuits import Spectra, written

Floats = NDArray[np.float64]


def removal_effects(lab: Lab, watched: Watched, found: Sequence[Spectra]) -> Floats:
    """First-order change of each prompt's margin when a component is removed, float64
    [prompts, layers, heads, r]; `found` are the spectra of every layer."""
    reach = [written(lab.arch, lab.checkpoint, layer, own.right) for layer, own in enumerate(found)]
    parts = []
    for part in pieces(len(watched.rows), lab.budget):
        lab.progress("effects of components", part.start, len(watched.rows))

        def effects(part: slice = part) -> NDArray[Any]:
            z, slopes = _gradients(lab, watched, part)
            rights = [own.right for own in found]
            return np.stack(list(map(_effects, z, slopes, reach, rights)), axis=1)

        name = f"effects of components, prompts {part.start} to {part.stop}"
        parts.append(lab.journal.array(name, effects))
    return np.concatenate(parts)


def _effects(z: Floats, slope: Floats, reach: Floats, right: Floats) -> Floats:
    """−Σ (z·W_O·v_i)(g·v_i) over positions, [n, heads, r], of a layer's z [n, length, heads·dh]
    and slope [n, length, width]."""
    heads, dim, rank = reach.shape
    prompts, length, width = slope.shape
    by_head = z.reshape(prompts * length, heads, dim).transpose(1, 0, 2)
    products = (by_head @ reach) * (slope.reshape(prompts * length, width) @ right)
    summed = products.reshape(heads, prompts, length, rank).sum(axis=2)
    return np.asarray(-summed.transpose(1, 0, 2), np.float64)


def _gradients(lab: Lab, watched: Watched, part: slice) -> tuple[list[Floats], list[Floats]]:
    """Of every layer, what `o_proj` reads, and the gradient of the margin by what it gives, both
    float64 [n, length, …] with 0 where padded."""
    import torch

    inputs = inputs_of(lab.runtime, watched.rows[part])
    z: list[Any] = []
    leaves: list[Any] = []
    with ExitStack() as stack, torch.enable_grad():
        for layer in range(lab.arch.layers):
            module = lab.arch.module(lab.live, "o_proj", layer)
            stack.enter_context(module.register_forward_hook(_tap(z, leaves)))
        logits = lab.live(**inputs, use_cache=False).logits[:, -1]
        slopes = torch.autograd.grad(watched.margins(logits, part).sum(), leaves)
    real = inputs["attention_mask"][..., None].numpy() == 1
    return _float64(z, real), _float64(slopes, real)


def _tap(z: list[Any], leaves: list[Any]) -> Callable[[Any, Any, Any], Any]:
    """A hook that keeps a module's input, and adds zeros to its output to take a gradient by."""

    def hook(module: Any, given: Any, output: Any) -> Any:
        leaf = output.new_zeros(output.shape).requires_grad_()
        z.append(given[0].detach())
        leaves.append(leaf)
        return output + leaf

    return hook


def _float64(values: Sequence[Any], real: NDArray[np.bool_]) -> list[Floats]:
    return [np.where(real, value.numpy(), 0).astype(np.float64) for value in values]
