"""How well each MLP neuron tells two sets of prompts apart, as AurA scores them.

Suau et al., "Whispering Experts" (ICML 2024) and its official code: a neuron's response to a prompt
is the largest output of its linear layer over the prompt's tokens, before the activation; its
expertise is the area under the ROC curve of that response, the one set positive. Of a gated MLP the
linear layer here is the gate, whose output passes the activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.arch import Architecture


def peaks(model: Any, arch: Architecture, inputs: Mapping[str, Any]) -> NDArray[np.float32]:
    """The largest response of every neuron to each of n prompts, over real tokens:
    [n, layers, neurons]."""
    import torch

    found: list[NDArray[np.float32]] = []
    real = inputs["attention_mask"].bool()[..., None]

    def keep(module: Any, given: Any, result: Any) -> None:
        # In a fused projection the gate comes first, then as many outputs for up.
        own = result[..., : arch.sizes["mlp_width"]].reshape(*real.shape[:2], -1)
        found.append(own.masked_fill(~real, -torch.inf).amax(1).numpy())

    with torch.no_grad(), ExitStack() as stack:
        for layer in range(arch.layers):
            module = arch.module(model, arch.mlp_inputs[0], layer)
            stack.enter_context(module.register_forward_hook(keep))
        model(**inputs, use_cache=False, logits_to_keep=1)
    return np.stack(found, axis=1)


def auroc(positive: NDArray[Any], negative: NDArray[Any]) -> NDArray[np.float64]:
    """The area under the ROC curve of each column of responses, [p, n] and [q, n]: how often a
    positive is above a negative, ties counted half (Mann and Whitney's U over p·q). [n]."""
    from scipy.stats import rankdata

    p, q = len(positive), len(negative)
    ranks = rankdata(np.concatenate([positive, negative]), axis=0)
    above = ranks[:p].sum(axis=0) - p * (p + 1) / 2
    area: NDArray[np.float64] = above / (p * q)
    return area
