"""What each attention head does to the logits of chosen tokens at the last position.

Each method gives the change of a token's logit when the head's output there becomes what it is on
the corrupted prompt, all other heads kept: [prompts, layers, heads, tokens], float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.find.patching import Patching, Recorded

Effects = NDArray[np.float32]


@dataclass(frozen=True)
class Contrast:
    """Clean and corrupted runs of the same n prompts and the `tokens` [n, k] that are watched."""

    clean: Recorded
    corrupted: Recorded
    tokens: Any


def path_effects(patching: Patching, contrast: Contrast, heads: int, budget: int) -> Effects:
    """Exact: MLPs and norms follow. At most `budget` prompts-times-heads run at a time."""
    import torch

    clean, layers = contrast.clean, len(contrast.clean.z)
    prompts, k = contrast.tokens.shape
    found = np.empty((prompts, layers, heads, k), np.float32)
    with torch.no_grad():
        base = patching.logits(0, clean.residual[0], clean.z, contrast.tokens)[:, -1]
        for layer in range(layers):
            for prompt, head in _pairs(prompts, heads, budget):
                z = [own[prompt] if n >= layer else None for n, own in enumerate(clean.z)]
                z[layer] = _exchanged(contrast, layer, prompt, head, heads)
                rows = clean.residual[layer][prompt]
                logits = patching.logits(layer, rows, z, contrast.tokens[prompt])[:, -1]
                found[prompt, layer, head] = (logits - base[prompt]).numpy()
    return found


def _exchanged(contrast: Contrast, layer: int, prompt: Any, head: Any, heads: int) -> Any:
    """The clean z of some prompts with one head's slice of the corrupted run in each row."""
    import torch

    clean, corrupted = contrast.clean.z[layer][prompt], contrast.corrupted.z[layer][prompt]
    of_head = torch.arange(heads)[None] == head[:, None]
    taken = of_head.repeat_interleave(clean.shape[-1] // heads, dim=1)[:, None]
    return torch.where(taken, corrupted, clean)


def gradient_effects(patching: Patching, contrast: Contrast, heads: int) -> Effects:
    """First order: (z_corrupted - z_clean) times the gradient of the logit at the last position."""
    import torch

    clean = contrast.clean
    prompts, k = contrast.tokens.shape
    leaves = [own[:, -1:].clone().requires_grad_() for own in clean.z]
    with torch.enable_grad():
        logits = patching.logits(0, clean.residual[0][:, -1:], leaves, contrast.tokens)[:, -1]
        found = np.empty((prompts, len(leaves), heads, k), np.float32)
        for token in range(k):
            wanted = torch.autograd.grad(logits[:, token].sum(), leaves, retain_graph=True)
            for layer, slope in enumerate(wanted):
                moved = contrast.corrupted.z[layer][:, -1:] - clean.z[layer][:, -1:]
                products = (slope * moved).reshape(prompts, heads, -1).sum(-1)
                found[:, layer, :, token] = products.detach().numpy()
    return found


def direct_effects(patching: Patching, contrast: Contrast, heads: int, budget: int) -> Effects:
    """MLPs frozen as well: what the head itself adds to the residual stream differs, and passes
    the final norm and the output head alone."""
    import torch

    clean, layers = contrast.clean, len(contrast.clean.z)
    prompts, k = contrast.tokens.shape
    found = np.empty((prompts, layers, heads, k), np.float32)

    def logits(residual: Any, prompt: Any) -> Any:
        return patching.logits(layers, residual, (), contrast.tokens[prompt])[:, -1]

    with torch.no_grad():
        base = logits(clean.residual[-1], slice(None))
        for layer in range(layers):
            before = patching.written(layer, clean.z[layer])
            for prompt, head in _pairs(prompts, heads, budget):
                z = _exchanged(contrast, layer, prompt, head, heads)
                moved = patching.written(layer, z) - before[prompt]
                after = logits(clean.residual[-1][prompt] + moved, prompt)
                found[prompt, layer, head] = (after - base[prompt]).numpy()
    return found


def _pairs(prompts: int, heads: int, budget: int) -> Iterator[tuple[Any, Any]]:
    """Every prompt with every head, at most `budget` at a time: indices of both."""
    import torch

    for start in range(0, prompts * heads, budget):
        pairs = torch.arange(start, min(start + budget, prompts * heads))
        yield pairs // heads, pairs % heads
