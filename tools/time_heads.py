"""Time one way to score every head of a GPT-2 on random prompts.

`time_heads.py MODEL WAY OUT.npz [--budget N] [--every N]`: WAY is `path`, `direct`, `gradient`,
`all` (path, exchanged at all positions), or `loop`, the loop one would write with hooks: exact path
patching too, a forward of the whole batch with full logits for each head (with `--every`, for every
Nth one). OUT gets the effects [layers, heads, prompts, 2] and the seconds, loading left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.export.load import load_model
from surgery.export.tasks import find_task
from surgery.find.scores.head_effects import (
    Contrast,
    direct_effects,
    gradient_effects,
    path_effects,
)
from surgery.find.scores.patching import Patching

PROMPTS, LENGTH = 64, 32
WAYS = ("path", "direct", "gradient", "all", "loop")


def prompts(vocab: int) -> tuple[Any, Any, Any]:
    """Clean and corrupted token ids [64, 32], and the two tokens that are watched, [64, 2]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((PROMPTS, LENGTH), (PROMPTS, LENGTH), (PROMPTS, 2))
    clean, corrupted, tokens = (
        torch.randint(0, vocab, shape, generator=generator) for shape in shapes
    )
    return clean, corrupted, tokens


# ----------------------------------------------------------------------------------------- ours


def ours(patching: Patching, drawn: tuple[Any, Any, Any], way: str, budget: int) -> Any:
    """Effects [layers, heads, prompts, 2]; as many prompts at a time as `find heads` takes."""
    size = budget if way != "all" else max(1, budget // (patching.heads * LENGTH))
    parts = [
        part_effects(patching, tuple(own[start : start + size] for own in drawn), way, budget)
        for start in range(0, PROMPTS, size)
    ]
    return np.concatenate(parts, axis=1).swapaxes(1, 2)


def part_effects(patching: Patching, part: tuple[Any, ...], way: str, budget: int) -> Any:
    clean, corrupted, tokens = part
    runs = (patching.record(inputs(ids), way == "all", budget) for ids in (clean, corrupted))
    contrast = Contrast(*runs, tokens)
    if way == "gradient":
        return gradient_effects(patching, contrast, budget)
    of_layer = direct_effects if way == "direct" else path_effects
    return np.stack([of_layer(patching, contrast, n, budget) for n in range(patching.layers)])


def inputs(ids: Any) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# ----------------------------------------------------------------------------------------- loop


@torch.no_grad()
def loop(model: Any, drawn: tuple[Any, Any, Any], every: int) -> Any:
    """The same by one hooked forward for each head; NaN for those that are left out."""
    clean, corrupted, tokens = drawn
    layers, heads = model.config.n_layer, model.config.n_head
    size = model.config.n_embd // heads
    base, held = cached(model, clean)
    _, other = cached(model, corrupted)
    base = base.gather(1, tokens)
    found = np.full((layers, heads, PROMPTS, 2), np.nan, np.float32)
    for index in range(0, layers * heads, every):
        layer, head = divmod(index, heads)
        own = slice(head * size, (head + 1) * size)
        patched = held[layer].clone()
        patched[:, -1, own] = other[layer][:, -1, own]
        with rewritten(model, [*held[:layer], patched, *held[layer + 1 :]]):
            logits = model(**inputs(clean), use_cache=False).logits[:, -1]
        found[layer, head] = (logits.gather(1, tokens) - base).numpy()
    return found


def cached(model: Any, ids: Any) -> tuple[Any, list[Any]]:
    """Logits at the last position, and what each output projection of attention reads."""
    seen: list[Any] = []
    with ExitStack() as stack:
        for block in model.transformer.h:
            keep = block.attn.c_proj.register_forward_pre_hook(lambda _, given: seen.append(*given))
            stack.enter_context(keep)
        return model(**inputs(ids), use_cache=False).logits[:, -1], seen


@contextmanager
def rewritten(model: Any, z: list[Any]) -> Iterator[None]:
    """While entered, the output projections read `z`, layer by layer."""
    with ExitStack() as stack:
        for block, value in zip(model.transformer.h, z, strict=True):
            give = block.attn.c_proj.register_forward_pre_hook(lambda *_, value=value: (value,))
            stack.enter_context(give)
        yield


# ----------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget", type=int, default=768)
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    model = load_model(options.model, find_task("causal-lm"), "float32")
    drawn = prompts(model.config.vocab_size)
    patching = Patching(model, identify(Checkpoint.open(options.model)))
    model(**inputs(drawn[0][:1]))  # what torch sets up once is nobody's
    begin = time.perf_counter()
    if options.way == "loop":
        found = loop(model, drawn, options.every)
    else:
        found = ours(patching, drawn, options.way, options.budget)
    seconds = time.perf_counter() - begin
    np.savez(options.out, effects=found, seconds=seconds)


if __name__ == "__main__":
    main()
