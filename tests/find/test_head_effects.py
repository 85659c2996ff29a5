"""Path patching is a head exchanged in the whole model with all other heads held, to a rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from models import Zoo, deep, family_of

from surgery.arch import Architecture, identify
from surgery.checkpoint import Checkpoint
from surgery.export.load import forward_inputs, load_model
from surgery.export.tasks import find_task
from surgery.find.scores.head_effects import (
    Contrast,
    direct_effects,
    gradient_effects,
    path_effects,
)
from surgery.find.scores.patching import Patching
from surgery.runtimes.pytorch import widen

FAMILIES = ("gpt2", "llama", "gptj", "gemma2", "mixtral")
MORE = ("falcon", "falcon-new", "falcon-rw", "bloom", "gpt_neox", "gpt_neox-sequential", "mpt",
        "opt", "opt-unbiased", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3",
        "qwen3_moe")  # fmt: skip
"""Sequential and parallel blocks, norms after attention, experts, shared keys and values, ALiBi."""
PARALLEL = ("gptj", "falcon", "falcon-new", "gpt_neox")
TOLERANCE = 1e-5
"""Of logits of size 1; float32 noise of these models is 4e-7."""

OUTPUTS = {
    "gpt2": "transformer.h.{}.attn.c_proj",
    "gptj": "transformer.h.{}.attn.out_proj",
    "falcon": "transformer.h.{}.self_attention.dense",
    "bloom": "transformer.h.{}.self_attention.dense",
    "gpt_neox": "gpt_neox.layers.{}.attention.dense",
    "mpt": "transformer.blocks.{}.attn.out_proj",
    "opt": "model.decoder.layers.{}.self_attn.out_proj",
}
"""The output projection of attention, by transformers' own names; elsewhere as in Llama."""
LIKE_LLAMA = "model.layers.{}.self_attn.o_proj"

MLPS = {
    "gpt2": "transformer.h.{}.mlp",
    "gptj": "transformer.h.{}.mlp",
    "falcon": "transformer.h.{}.mlp.dense_4h_to_h",
    "bloom": "transformer.h.{}.mlp.dense_4h_to_h",
    "gpt_neox": "gpt_neox.layers.{}.mlp",
    "mpt": "transformer.blocks.{}.ffn.down_proj",
    "opt": "model.decoder.layers.{}.fc2",
}
"""Whose output is what the MLP gives, before any norm or sum; elsewhere as in Llama."""
MLP_LIKE_LLAMA = "model.layers.{}.mlp"

Rewrite = Callable[[int, Any], Any]


@dataclass
class Case:
    """A model and three prompts, clean and corrupted, the second padded on the left.

    What is done to the model here shares nothing with the code under test.
    """

    name: str
    model: Any
    arch: Architecture
    clean: dict[str, Any]
    corrupted: dict[str, Any]
    tokens: Any

    @property
    def layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def heads(self) -> int:
        return int(self.model.config.num_attention_heads)

    def contrast(self, patching: Patching, whole: bool = False) -> Contrast:
        runs = (patching.record(inputs, whole) for inputs in (self.clean, self.corrupted))
        return Contrast(*runs, self.tokens)

    def logits(self, inputs: dict[str, Any], rewrite: Rewrite) -> Any:
        """Logits [3, 7, 2] of the tokens at each position of a whole run in which the input of
        each layer's output projection is rewritten."""

        def hook(layer: int) -> Callable[[Any, Any], Any]:
            return lambda module, given: (rewrite(layer, given[0]), *given[1:])

        path = OUTPUTS.get(family_of(self.name), LIKE_LLAMA)
        outputs = [self.model.get_submodule(path.format(n)) for n in range(self.layers)]
        hooks = [o.register_forward_pre_hook(hook(n)) for n, o in enumerate(outputs)]
        with torch.no_grad():
            every = self.model(**inputs, use_cache=False).logits
        for handle in hooks:
            handle.remove()
        return every.gather(2, self.tokens[:, None].expand(-1, every.shape[1], -1))

    def recorded(self, inputs: dict[str, Any]) -> tuple[Any, list[Any]]:
        z: list[Any] = [None] * self.layers

        def keep(layer: int, value: Any) -> Any:
            z[layer] = value.clone()
            return value

        return self.logits(inputs, keep), z

    @contextmanager
    def mlps_held(self) -> Iterator[None]:
        """While entered, every MLP gives what it gives on the clean prompts."""
        path = MLPS.get(family_of(self.name), MLP_LIKE_LLAMA)
        mlps = [self.model.get_submodule(path.format(n)) for n in range(self.layers)]
        seen: dict[Any, Any] = {}

        def keep(module: Any, given: Any, out: Any) -> None:
            seen[module] = out.clone()  # falcon adds to it in place

        hooks = [m.register_forward_hook(keep) for m in mlps]
        self.recorded(self.clean)
        for handle in hooks:
            handle.remove()
        hooks = [m.register_forward_hook(lambda m, *_: seen[m].clone()) for m in mlps]
        yield
        for handle in hooks:
            handle.remove()

    def exchange(self, where: slice) -> Callable[[int, int], Any]:
        """Of a layer and a head, the change of the logits [3, 7, 2] where the head's output at
        some positions becomes that of the corrupted prompt and every other head's is held."""
        base, clean = self.recorded(self.clean)
        _, corrupted = self.recorded(self.corrupted)

        def change(layer: int, head: int) -> Any:
            def rewrite(at: int, value: Any) -> Any:
                held = clean[at].clone()
                if at == layer:
                    size = held.shape[-1] // self.heads
                    own = slice(head * size, (head + 1) * size)
                    held[:, where, own] = corrupted[at][:, where, own]
                return held

            return (self.logits(self.clean, rewrite) - base).numpy()

        return change


def path(patching: Patching, contrast: Contrast, budget: int = 64) -> Any:
    layers = range(patching.layers)
    return np.stack([path_effects(patching, contrast, layer, budget) for layer in layers])


def direct(patching: Patching, contrast: Contrast, budget: int = 64) -> Any:
    layers = range(patching.layers)
    return np.stack([direct_effects(patching, contrast, layer, budget) for layer in layers])


@pytest.fixture(params=[*FAMILIES, *(pytest.param(f, marks=pytest.mark.campaign) for f in MORE)])
def case(request: pytest.FixtureRequest, zoo: Zoo) -> Case:
    folder = zoo.checkpoint(request.param, **deep(request.param, 3))
    task, arch = find_task("causal-lm"), identify(Checkpoint.open(folder))
    model = load_model(folder, task, "float32")
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, :2] = 0

    def inputs() -> dict[str, Any]:
        ids = torch.randint(0, arch.sizes["vocab"], (3, 7), generator=generator)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        every = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return {name: every[name] for name in forward_inputs(model, task)}

    tokens = torch.tensor([[1, 2], [3, 4], [5, 6]])
    return Case(request.param, model, arch, inputs(), inputs(), tokens)


@pytest.mark.parametrize("whole", [False, True])
def test_every_heads_effect_is_that_of_the_whole_model(case: Case, whole: bool) -> None:
    """The reference: one head at a time, the whole model, every other head held by hand."""
    change = case.exchange(slice(None) if whole else slice(-1, None))
    patching = Patching(case.model, case.arch)
    found = path(patching, case.contrast(patching, whole), budget=7)
    assert np.abs(found).max() > 0.01
    for layer in range(case.layers):
        for head in range(case.heads):
            wanted = change(layer, head)[:, -1]
            np.testing.assert_allclose(found[layer, :, head], wanted, rtol=0, atol=TOLERANCE)


def test_exchanged_at_all_positions_each_position_is_that_of_the_whole_model(case: Case) -> None:
    change = case.exchange(slice(None))
    patching = Patching(case.model, case.arch)
    contrast = case.contrast(patching, whole=True)
    for layer in range(case.layers):
        z, size = contrast.clean.z[layer].clone(), contrast.clean.z[layer].shape[-1] // case.heads
        z[:, :, :size] = contrast.corrupted.z[layer][:, :, :size]
        with torch.no_grad():
            attention = (patching.projected(layer, z), *contrast.clean.attention[layer + 1 :])
            after = patching.logits(layer, contrast.clean.residual[layer], attention, case.tokens)
            final = contrast.clean.residual[-1]
            before = patching.logits(case.layers, final, (), case.tokens)
        wanted = change(layer, 0)
        np.testing.assert_allclose((after - before).numpy(), wanted, rtol=0, atol=TOLERANCE)
        assert (np.abs(wanted).max(axis=(0, 2)) > 1e-4).all()


def test_what_a_head_does_at_other_positions_never_reaches_the_last_one(case: Case) -> None:
    """Only attention mixes positions, and all of it is held."""
    patching = Patching(case.model, case.arch)
    every = path(patching, case.contrast(patching, whole=True))
    last = path(patching, case.contrast(patching))
    np.testing.assert_allclose(every, last, rtol=0, atol=TOLERANCE)


def test_the_gradient_is_the_slope_of_the_exact_effect(case: Case) -> None:
    """Central differences of it, in float64: the step is small beside any kink of an activation.

    Without `widen`, padding is NaN in float64 wherever attention is computed eagerly.
    """
    case.model.double()
    step = 1e-5
    with widen(torch):
        patching = Patching(case.model, case.arch)
        contrast = case.contrast(patching)
        slope = gradient_effects(patching, contrast, budget=6)
        after, before = (path(patching, _part_of_the_way(contrast, s)) for s in (step, -step))
    central = (after - before) / (2 * step)
    assert np.abs(slope).max() > 0.01
    np.testing.assert_allclose(central, slope, rtol=1e-5, atol=1e-6 * np.abs(slope).max())


def _part_of_the_way(contrast: Contrast, step: float) -> Contrast:
    pairs = zip(contrast.clean.z, contrast.corrupted.z, strict=True)
    near = tuple(clean + step * (corrupted - clean) for clean, corrupted in pairs)
    return Contrast(contrast.clean, type(contrast.clean)(near, (), ()), contrast.tokens)


def test_every_heads_direct_effect_is_that_of_the_whole_model_with_mlps_held(case: Case) -> None:
    change = case.exchange(slice(-1, None))
    patching = Patching(case.model, case.arch)
    found = direct(patching, case.contrast(patching), budget=7)
    assert np.abs(found).max() > 0.01
    with case.mlps_held():
        for layer in range(case.layers):
            for head in range(case.heads):
                wanted = change(layer, head)[:, -1]
                np.testing.assert_allclose(found[layer, :, head], wanted, rtol=0, atol=TOLERANCE)


def test_with_no_mlp_after_it_a_heads_direct_effect_is_its_whole_one(case: Case) -> None:
    """In the last of parallel blocks; in a sequential one the layer's own MLP follows."""
    patching = Patching(case.model, case.arch)
    contrast = case.contrast(patching)
    own = direct(patching, contrast, budget=5)[-1]
    equal = np.allclose(own, path(patching, contrast)[-1], rtol=0, atol=TOLERANCE)
    assert equal is (case.name in PARALLEL)
    assert np.abs(own).max() > 0.01


def test_direct_effects_and_slopes_read_the_last_position_of_whole_records(case: Case) -> None:
    patching = Patching(case.model, case.arch)
    last, every = case.contrast(patching), case.contrast(patching, whole=True)
    for effects in (direct, gradient_effects):
        found, wanted = (effects(patching, contrast, 64) for contrast in (every, last))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_what_is_recorded_is_what_the_model_computed(case: Case) -> None:
    """Some families add in place to what a hook sees."""
    _, z = case.recorded(case.clean)
    streams = case.model(**case.clean, use_cache=False, output_hidden_states=True).hidden_states
    patching = Patching(case.model, case.arch)
    found = patching.record(case.clean, whole=True)
    for layer in range(case.layers):
        assert torch.equal(found.z[layer], z[layer])
        assert torch.equal(found.residual[layer], streams[layer])
        assert torch.equal(found.attention[layer], patching.projected(layer, z[layer]))
    last = patching.record(case.clean, budget=14)
    for one, other in zip(last.residual, found.last().residual, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_recorded_stays_when_the_model_writes_over_it(case: Case, whole: bool) -> None:
    """As families do that add in place; and the last position keeps no other one in memory."""
    patching = Patching(case.model, case.arch)
    wanted = patching.record(case.clean, whole)
    path = OUTPUTS.get(family_of(case.name), LIKE_LLAMA)

    def wipe(module: Any, given: Any, out: Any) -> None:
        given[0].zero_()

    for layer in range(case.layers):
        output = case.model.get_submodule(path.format(layer))
        output.register_forward_hook(wipe)
    found = patching.record(case.clean, whole)
    for one, other in zip(found.z, wanted.z, strict=True):
        assert torch.equal(one, other)
        assert one.untyped_storage().nbytes() == one.numel() * one.element_size()


def test_nothing_is_left_in_the_model(case: Case) -> None:
    before, _ = case.recorded(case.clean)
    patching = Patching(case.model, case.arch)
    path(patching, case.contrast(patching))
    after, _ = case.recorded(case.clean)
    assert torch.equal(before, after)


def test_one_head_given_its_own_output_changes_nothing(case: Case) -> None:
    patching = Patching(case.model, case.arch)
    clean = patching.record(case.clean)
    same = Contrast(clean, clean, case.tokens)
    assert np.abs(path(patching, same)).max() < TOLERANCE
