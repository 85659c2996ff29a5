"""Differences of means of the residual stream, and how well each tells two sets of prompts apart.

Of layer l: r_l = mean over one set − mean over the other of the stream after block l, scaled to
norm 1 (Arditi et al., arXiv 2406.11717, section 2.3). Prompts weigh alike, whatever their length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.arch import Architecture
from surgery.errors import FindError
from surgery.find.prompts.rows import Inputs, is_real

Vectors = NDArray[np.float64]

LEAST = 1e-6
"""A difference shorter than this part of the means is rounding."""


@dataclass(frozen=True)
class Spread:
    """Of one set's prompts along each layer's direction: mean and variance [layers]."""

    mean: Vectors
    variance: Vectors


def streams(model: Any, arch: Architecture, inputs: Inputs, position: str) -> Vectors:
    """The residual stream after each block, float64 [batch, layers, width]: at the `last` token
    of each prompt, or as the `mean` over its tokens."""
    import torch

    kept: list[Any] = []

    def keep(module: Any, given: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        kept.append(_pooled(value, is_real(inputs), position))

    handles = [arch.block(model, n).register_forward_hook(keep) for n in range(arch.layers)]
    try:
        with torch.no_grad():
            model.base_model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found: Vectors = torch.stack(kept, 1).numpy()
    return found


def _pooled(value: Any, real: Any, position: str) -> Any:
    if position == "last":
        return value[:, -1].double()
    weights = real.double() / real.sum(1, keepdim=True)
    return (value.double() * weights[..., None]).sum(1)


def directions(first: Vectors, second: Vectors, orthogonalize: bool) -> Vectors:
    """Unit vectors [layers, width] from the mean `second` to the mean `first`, both of that shape.

    With `orthogonalize`, less their part along `second`, so that taking one out leaves what both
    sets have in common. Raises `FindError` where the means are the same.
    """
    found = first - second
    if orthogonalize:
        units = second / np.linalg.norm(second, axis=1, keepdims=True)
        found = found - (found * units).sum(1, keepdims=True) * units
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    if not (norms > LEAST * np.linalg.norm(second, axis=1, keepdims=True)).all():
        layer = int(np.argmin(norms))
        raise FindError(
            f"the two sets of prompts have the same mean after block {layer}; expected prompts "
            "that differ where --position looks"
        )
    return np.asarray(found / norms, np.float64)


def separation(first: Spread, second: Spread) -> Vectors:
    """d' [layers]: the difference of means in units of the standard deviation within a set, the
    root of both variances' mean. Raises `FindError` where nothing varies within them."""
    within = np.sqrt((first.variance + second.variance) / 2)
    if not (within > 0).all():
        raise FindError("the prompts of a set are all alike where --position looks; vary them")
    return np.asarray((first.mean - second.mean) / within, np.float64)
