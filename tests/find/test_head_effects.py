"""Path patching is a head exchanged in the whole model with all other heads held, to a rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from models import Zoo, deep

from surgery.arch import Architecture, identify
from surgery.checkpoint import Checkpoint
from surgery.export.load import forward_inputs, load_model
from surgery.export.tasks import find_task
from surgery.find.head_effects import Contrast, direct_effects, gradient_effects, path_effects
from surgery.find.patching import Patching

FAMILIES = ("gpt2", "llama", "gptj", "gemma2", "mixtral")
MORE = ("falcon", "bloom", "gpt_neox", "mpt", "opt", "qwen3", "gemma3_text", "phi3", "qwen3_moe")
"""Sequential and parallel blocks, norms after attention, experts, shared keys and values, ALiBi."""
PARALLEL = ("gptj", "falcon", "gpt_neox")
TOLERANCE = 1e-5
"""Of logits of size 1; float32 noise of these models is 4e-7."""

Rewrite = Callable[[int, Any], Any]


@dataclass
class Case:
    """A model and three prompts, clean and corrupted, the second padded on the left."""

    model: Any
    arch: Architecture
    clean: dict[str, Any]
    corrupted: dict[str, Any]
    tokens: Any

    @property
    def heads(self) -> int:
        return self.arch.sizes["heads"]

    def contrast(self, patching: Patching) -> Contrast:
        return Contrast(patching.record(self.clean), patching.record(self.corrupted), self.tokens)

    def logits(self, inputs: dict[str, Any], rewrite: Rewrite) -> Any:
        """Logits of the tokens at the last position of a whole run in which the input of each
        layer's `o_proj` is rewritten."""

        def hook(layer: int) -> Callable[[Any, Any], Any]:
            return lambda module, given: (rewrite(layer, given[0]), *given[1:])

        layers = range(self.arch.layers)
        outputs = [self.arch.module(self.model, "o_proj", layer) for layer in layers]
        hooks = [o.register_forward_pre_hook(hook(n)) for n, o in enumerate(outputs)]
        with torch.no_grad():
            last = self.model(**inputs, use_cache=False).logits[:, -1]
        for handle in hooks:
            handle.remove()
        return last.gather(1, self.tokens)

    def recorded(self, inputs: dict[str, Any]) -> tuple[Any, list[Any]]:
        z: list[Any] = [None] * self.arch.layers

        def keep(layer: int, value: Any) -> Any:
            z[layer] = value.clone()
            return value

        return self.logits(inputs, keep), z


@pytest.fixture(params=[*FAMILIES, *(pytest.param(f, marks=pytest.mark.campaign) for f in MORE)])
def case(request: pytest.FixtureRequest, zoo: Zoo) -> Case:
    path = zoo.checkpoint(request.param, **deep(request.param, 3))
    task, arch = find_task("causal-lm"), identify(Checkpoint.open(path))
    model = load_model(path, task, "float32")
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, :2] = 0

    def inputs() -> dict[str, Any]:
        ids = torch.randint(0, arch.sizes["vocab"], (3, 7), generator=generator)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        every = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return {name: every[name] for name in forward_inputs(model, task)}

    return Case(model, arch, inputs(), inputs(), torch.tensor([[1, 2], [3, 4], [5, 6]]))


def test_every_heads_effect_is_that_of_the_whole_model(case: Case) -> None:
    """The reference: one head at a time, the whole model, every other head held by hand."""
    base, clean = case.recorded(case.clean)
    _, corrupted = case.recorded(case.corrupted)
    patching = Patching(case.model, case.arch)
    found = path_effects(patching, case.contrast(patching), case.heads, budget=7)
    assert np.abs(found).max() > 0.01
    for layer in range(case.arch.layers):
        for head in range(case.heads):

            def exchange(at: int, value: Any, layer: int = layer, head: int = head) -> Any:
                held = clean[at].clone()
                if at == layer:
                    size = held.shape[-1] // case.heads
                    own = slice(head * size, (head + 1) * size)
                    held[:, -1, own] = corrupted[at][:, -1, own]
                return held

            wanted = (case.logits(case.clean, exchange) - base).numpy()
            np.testing.assert_allclose(found[:, layer, head], wanted, rtol=0, atol=TOLERANCE)


def test_the_gradient_is_the_slope_of_the_exact_effect(case: Case) -> None:
    """Moved a hundredth of the way, the exact effect is a hundredth of the first-order one."""
    patching = Patching(case.model, case.arch)
    contrast = case.contrast(patching)
    slope = gradient_effects(patching, contrast, case.heads)
    step = 1e-2
    near = [c + step * (x - c) for c, x in zip(contrast.clean.z, contrast.corrupted.z, strict=True)]
    moved = Contrast(contrast.clean, type(contrast.clean)(tuple(near), ()), contrast.tokens)
    exact = path_effects(patching, moved, case.heads, budget=64) / step
    np.testing.assert_allclose(exact, slope, rtol=0.1, atol=0.03 * np.abs(slope).max())


def test_with_no_mlp_after_it_a_heads_direct_effect_is_its_whole_one(case: Case) -> None:
    """In the last of parallel blocks; in a sequential one the layer's own MLP follows."""
    patching = Patching(case.model, case.arch)
    contrast = case.contrast(patching)
    direct = direct_effects(patching, contrast, case.heads, budget=5)[:, -1]
    path = path_effects(patching, contrast, case.heads, budget=64)[:, -1]
    equal = np.allclose(direct, path, rtol=0, atol=TOLERANCE)
    assert equal is (case.arch.family in PARALLEL)
    assert np.abs(direct).max() > 0.01


def test_nothing_is_left_in_the_model(case: Case) -> None:
    before, _ = case.recorded(case.clean)
    patching = Patching(case.model, case.arch)
    path_effects(patching, case.contrast(patching), case.heads, budget=64)
    after, _ = case.recorded(case.clean)
    assert torch.equal(before, after)


def test_one_head_given_its_own_output_changes_nothing(case: Case) -> None:
    patching = Patching(case.model, case.arch)
    clean = patching.record(case.clean)
    same = Contrast(clean, clean, case.tokens)
    assert np.abs(path_effects(patching, same, case.heads, budget=64)).max() < TOLERANCE
