"""Live models against edited weights: batches, float noise, and loading weights before rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgery.apply import apply_plan
from surgery.checkpoint import Checkpoint
from surgery.editor import Editor

NOISE_FACTOR = 20
"""Edited and hooked models may differ by this many times the noise of float32 itself."""

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint in stock transformers, with the head its config names.

    Experts run one by one: multiplying them in groups is not implemented in float64.
    """
    import transformers

    torch.set_num_threads(1)
    [name] = Checkpoint.open(folder).config["architectures"]
    cls = getattr(transformers, name)
    how = {"attn_implementation": "sdpa" if cls._supports_sdpa else "eager"}
    if cls._can_set_experts_implementation():
        how["experts_implementation"] = "eager"
    return cls.from_pretrained(folder, dtype=dtype, **how).eval()


def logits(model: Any, *, left: bool = True) -> np.ndarray[Any, Any]:
    """Logits [real positions, vocab] in float64, on a batch padded right and, with `left`, left."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 101, (3, 7), generator=generator)
    right = torch.arange(7)[None] < torch.tensor([7, 4, 2])[:, None]
    with torch.no_grad():
        kept = [
            model(input_ids=ids, attention_mask=mask.long()).logits[mask]
            for mask in ((right, right.flip(1)) if left else (right,))
        ]
    return torch.cat(kept).double().numpy()


@lru_cache(maxsize=64)
def noise(folder: Path) -> float:
    """Greatest difference of the unedited model's logits in float32 and in float64.

    On the right-padded batch: rows that may attend nowhere are NaN in eager float64 attention,
    which is all that some families have.
    """
    low, high = (
        logits(load_model(folder, dtype), left=False) for dtype in (torch.float32, torch.float64)
    )
    assert np.isfinite(high).all()
    return float(np.abs(low - high).max())


def edited_logits(editor: Editor, output: Path) -> np.ndarray[Any, Any]:
    """Logits of the applied checkpoint with every edited tensor as it was before rounding."""
    apply_plan(editor.plan, output)
    model = load_model(output)
    arch = editor.plan.arch
    with torch.no_grad():
        for tensor in editor.plan.edited:
            arch.parameter(model, tensor).copy_(torch.from_numpy(editor.unrounded(tensor)))
    return logits(model)


@contextmanager
def all_hooks(editor: Editor, model: Any) -> Iterator[None]:
    """Every edit of a plan as hooks on the live, unedited model."""
    with ExitStack() as stack:
        for index, edit in enumerate(editor.plan.edits):
            stack.enter_context(edit.hook(model, editor.plan.arch, editor.state(index)))
        yield


def assert_equivalent(
    editor: Editor,
    output: Path,
    hooked: Callable[[Any], AbstractContextManager[None]] | None = None,
) -> None:
    """The edited weights before rounding do what the hooks (by default the edits' own) do to the
    unedited model, and they do something."""
    base = editor.plan.base.root
    model = load_model(base)
    before = logits(model)
    with hooked(model) if hooked else all_hooks(editor, model):
        expected = logits(model)
    found, limit = edited_logits(editor, output), NOISE_FACTOR * noise(base)
    assert np.abs(expected - before).max() > 50 * limit, "the edit does nothing"
    assert np.abs(found - expected).max() <= limit


def assert_rounded_once(editor: Editor, output: Path) -> None:
    """What is stored is the edited tensor rounded by torch's own cast, to the bit."""
    result = Checkpoint.open(output)
    for tensor in editor.plan.edited:
        dtype = TORCH[result.info(tensor).dtype]
        rounded = torch.from_numpy(editor.unrounded(tensor)).to(dtype).contiguous()
        assert result.read_bytes(tensor) == bytes(rounded.view(torch.uint8).numpy()), tensor


@contextmanager
def forward_hooks(
    model: Any,
    outputs: Mapping[str, Callable[[Any], Any]] | None = None,
    inputs: Mapping[str, Callable[[Any], Any]] | None = None,
) -> Iterator[None]:
    """Changes outputs and first inputs of modules named by their path; our own hand on them."""

    def after(change: Callable[[Any], Any]) -> Any:
        return lambda module, args, output: change(output)

    def before(change: Callable[[Any], Any]) -> Any:
        return lambda module, args: (change(args[0]), *args[1:])

    with ExitStack() as stack:
        for path, change in (outputs or {}).items():
            stack.enter_context(model.get_submodule(path).register_forward_hook(after(change)))
        for path, change in (inputs or {}).items():
            stack.enter_context(model.get_submodule(path).register_forward_pre_hook(before(change)))
        yield
