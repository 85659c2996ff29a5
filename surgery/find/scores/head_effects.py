"""What each attention head does to the logits of chosen tokens at the last position.

Each method gives the change of a token's logit when the head's output becomes what it is on the
corrupted prompt, all other heads kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.find.scores.patching import Patching, Recorded

Effects = NDArray[np.float32]


@dataclass(frozen=True)
class Contrast:
    """Clean and corrupted runs of the same n prompts, at their last position or at all, and the
    `tokens` [n, k] that are watched."""

    clean: Recorded
    corrupted: Recorded
    tokens: Any

    def last(self) -> Contrast:
        """The last position alone."""
        return Contrast(self.clean.last(), self.corrupted.last(), self.tokens)

    def of(self, prompts: Any) -> Contrast:
        """Some of the prompts."""
        return Contrast(self.clean.of(prompts), self.corrupted.of(prompts), self.tokens[prompts])


def path_effects(patching: Patching, contrast: Contrast, layer: int, budget: int) -> Effects:
    """Exact, of one layer's heads, float32 [prompts, heads, tokens]: MLPs and norms follow.

    The head's output is exchanged at every position that was recorded. As many prompts-times-heads
    run at a time as have at most `budget` positions in all, or one.
    """
    import torch

    clean = contrast.clean
    found = _empty(contrast, patching.heads)
    budget = max(1, budget // clean.residual[layer].shape[1])
    with torch.no_grad():
        base = _head_of(patching, clean.residual[-1], contrast.tokens)
        for prompt, head in _pairs(len(found), patching.heads, budget):
            z = _exchanged(contrast, layer, prompt, head, patching.heads)
            after = [own[prompt] for own in clean.attention[layer + 1 :]]
            attention = [patching.projected(layer, z), *after]
            rows, tokens = clean.residual[layer][prompt], contrast.tokens[prompt]
            logits = patching.logits(layer, rows, attention, tokens)[:, -1]
            found[prompt, head] = (logits - base[prompt]).numpy()
    return found


def direct_effects(patching: Patching, contrast: Contrast, layer: int, budget: int) -> Effects:
    """MLPs frozen as well, of one layer's heads, float32 [prompts, heads, tokens]: what the head
    itself adds to the residual stream differs, and passes the final norm and the output head."""
    import torch

    contrast = contrast.last()
    final, tokens = contrast.clean.residual[-1], contrast.tokens
    found = _empty(contrast, patching.heads)
    with torch.no_grad():
        base = _head_of(patching, final, tokens)
        before = patching.written(layer, contrast.clean.z[layer])
        for prompt, head in _pairs(len(found), patching.heads, budget):
            z = _exchanged(contrast, layer, prompt, head, patching.heads)
            moved = patching.written(layer, z) - before[prompt]
            after = _head_of(patching, final[prompt] + moved, tokens[prompt])
            found[prompt, head] = (after - base[prompt]).numpy()
    return found


def gradient_effects(patching: Patching, contrast: Contrast, budget: int) -> Effects:
    """First order, of all layers, float32 [layers, prompts, heads, tokens]: (z_corrupted - z_clean)
    times the gradient of the logit at the last position.

    What autograd keeps is of as many prompts-times-layers as `budget`, or of one prompt.
    """
    contrast = contrast.last()
    step = max(1, budget // patching.layers)
    starts = range(0, len(contrast.tokens), step)
    parts = [_slopes(patching, contrast.of(slice(start, start + step))) for start in starts]
    return np.concatenate(parts, axis=1)


def _slopes(patching: Patching, contrast: Contrast) -> Effects:
    import torch

    clean, tokens = contrast.clean, contrast.tokens
    leaves = [own.clone().requires_grad_() for own in clean.z]
    found = np.stack([_empty(contrast, patching.heads)] * patching.layers)
    with torch.enable_grad():
        attention = [patching.projected(layer, z) for layer, z in enumerate(leaves)]
        logits = patching.logits(0, clean.residual[0], attention, tokens)[:, -1]
        for token in range(tokens.shape[1]):
            slopes = torch.autograd.grad(logits[:, token].sum(), leaves, retain_graph=True)
            for layer, slope in enumerate(slopes):
                products = slope * (contrast.corrupted.z[layer] - clean.z[layer])
                found[layer, :, :, token] = _per_head(products, patching.heads).numpy()
    return found


def _head_of(patching: Patching, residual: Any, tokens: Any) -> Any:
    """Logits [m, k] of what enters the final norm, at the last position."""
    return patching.logits(patching.layers, residual[:, -1:], (), tokens)[:, -1]


def _per_head(values: Any, heads: int) -> Any:
    """Sums [n, heads] of values [n, 1, heads * head_dim] over each head's own."""
    return values.reshape(len(values), heads, -1).sum(-1)


def _exchanged(contrast: Contrast, layer: int, prompt: Any, head: Any, heads: int) -> Any:
    """The clean z of some prompts with one head's slice of the corrupted run in each row."""
    import torch

    clean, corrupted = contrast.clean.z[layer][prompt], contrast.corrupted.z[layer][prompt]
    of_head = torch.arange(heads)[None] == head[:, None]
    taken = of_head.repeat_interleave(clean.shape[-1] // heads, dim=1)[:, None]
    return torch.where(taken, corrupted, clean)


def _empty(contrast: Contrast, heads: int) -> Effects:
    prompts, k = contrast.tokens.shape
    return np.full((prompts, heads, k), np.nan, np.float32)


def _pairs(prompts: int, heads: int, budget: int) -> Iterator[tuple[Any, Any]]:
    """Every prompt with every head, at most `budget` at a time: indices of both."""
    import torch

    for start in range(0, prompts * heads, budget):
        pairs = torch.arange(start, min(start + budget, prompts * heads))
        yield pairs // heads, pairs % heads
