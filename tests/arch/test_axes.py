"""Axes proven by behaviour: what a region of the file does in the live model.

Heads are split in activations by the model's own config, and activations are taken from the
unedited or edited live model; nothing here is read off a name or a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from live import HEADS, REAL, Live, Tensor, dense_layers, inputs_of, run, taken
from oracles import NOISE_FACTOR, logits, noise

from surgery.addresses import Head, Neuron

ENCODERS = ("bert", "roberta", "distilbert")


def heads_of(live: Live, z: Tensor) -> Tensor:
    """z [..., heads, head_dim], by the model's own config."""
    assert live.model.config.num_attention_heads == HEADS
    return z.unflatten(-1, (HEADS, -1))


def group_of(live: Live, head: int) -> list[int]:
    """The heads that share keys and values with `head`, from the model's own config."""
    config = live.model.config
    shared = getattr(config, "num_key_value_heads", None)
    if config.model_type == "falcon":
        several = config.new_decoder_architecture or not config.multi_query
        shared = config.num_kv_heads if several else 1
    size = HEADS // (shared or HEADS)
    return [other for other in range(HEADS) if other // size == head // size]


@pytest.mark.parametrize("head", [0, 1, 3])
def test_a_zeroed_head_region_is_a_zeroed_head(live: Live, head: int) -> None:
    def drop(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        z = heads_of(live, inputs[0]).clone()
        z[..., head, :] = 0
        return (z.flatten(-2), *inputs[1:])

    edited = live.scaled([live.arch.head_region(Head(1, head))])
    with live.arch.module(live.model, "o_proj", 1).register_forward_pre_hook(drop):
        expected = logits(live.model)
    limit = NOISE_FACTOR * noise(live.base)
    assert abs(expected - logits(live.model)).max() > 50 * limit
    assert abs(logits(edited) - expected).max() <= limit


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_part_of_a_head_is_read_by_its_heads_alone(live: Live, part: str, padded: bool) -> None:
    """Zeroed values leave z zero; zeroed queries and keys change where the head looks."""
    before = heads_of(live, inputs_of(live, live.model, "o_proj", 0, padded))[REAL]
    for head in range(HEADS):
        bands = live.arch.qkv_regions(Head(0, head))[part]
        edited = live.scaled([band.region for band in bands])
        after = heads_of(live, inputs_of(live, edited, "o_proj", 0, padded))[REAL]
        changed = [h for h in range(HEADS) if (after[:, h] - before[:, h]).abs().max() > 1e-5]
        group = group_of(live, head)
        assert changed == ([head] if part == "q" else group)
        assert [live.arch.kv_group(Head(0, h)) for h in group] == [group[0] // len(group)] * len(
            group
        )
        still = [h for h in range(HEADS) if h not in changed]
        assert torch.allclose(after[:, still], before[:, still], atol=1e-6)
        if part == "v":
            assert (after[:, changed] == 0).all()


@pytest.mark.parametrize("head", [0, 3])
def test_queries_keys_and_values_are_told_apart(live: Live, head: int) -> None:
    """A query changed at one position moves z there alone; a key moves it elsewhere too, which
    positions before a changed one do not see in a decoder; a value moves it without softmax."""
    where, before = 2, heads_of(live, inputs_of(live, live.model, "o_proj", 0))
    moved = {}
    for part in "qkv":
        with changed_at(live, part, head, where):
            after = heads_of(live, inputs_of(live, live.model, "o_proj", 0))
        far = (after - before).abs().amax(dim=(0, 3)) > 1e-6
        moved[part] = {int(position) for position in far.any(dim=1).nonzero()}
    seeing = set(range(7)) if live.name in ENCODERS else set(range(where, 7))
    assert moved == {"q": {where}, "k": seeing, "v": seeing}


def test_norms_of_queries_and_of_keys_are_told_apart(live: Live) -> None:
    assert live.arch.qk_norm is (live.name in ("qwen3", "qwen3_moe", "gemma3_text"))
    for part in "qk" if live.arch.qk_norm else "":
        places = [(f"{part}_norm", 0), (f"{part}_proj", 0)]
        with taken(live.arch, live.model, places) as kept:
            run(live.model)
        given, made = kept[places[0]][0], kept[places[1]][1]
        by_head = made.unflatten(-1, (-1, live.dim))
        assert any(torch.equal(given, heads) for heads in (by_head, by_head.transpose(1, 2)))


@contextmanager
def changed_at(live: Live, part: str, head: int, position: int) -> Iterator[None]:
    """Other numbers for a part of a head at one position, where its projection puts them out."""
    band = live.arch.qkv_regions(Head(0, head))[part][0]
    rows = band.region.slices[band.axis]

    def change(module: Any, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        noise = torch.randn(
            output[:, position, rows].shape, generator=torch.Generator().manual_seed(0)
        )
        output[:, position, rows] += 3 * noise
        return output

    role = live.arch.roles[band.region.tensor]
    with live.arch.module(live.model, role.role, 0).register_forward_hook(change):
        yield


def test_a_neuron_is_computed_by_its_rows_and_the_activation(live: Live) -> None:
    """m_n = act(up_n) or act(gate_n) · up_n, recomputed from what the projections put out."""
    from transformers.activations import ACT2FN

    for layer in dense_layers(live):
        for neuron in (0, 5, live.arch.sizes["mlp_width"] - 1):
            regions = live.arch.gate_up_regions(Neuron(layer, neuron))
            outputs = {}
            for part, (weight, *_) in regions.items():
                role = live.arch.roles[weight.region.tensor].role
                with taken(live.arch, live.model, [(role, layer), ("down_proj", layer)]) as kept:
                    run(live.model)
                outputs[part] = kept[role, layer][1][..., weight.region.slices[weight.axis]]
            activated = ACT2FN[live.arch.activation](outputs.get("gate", outputs["up"]))
            expected = activated * outputs["up"] if "gate" in outputs else activated
            found = kept["down_proj", layer][0][..., [neuron]]
            assert torch.allclose(found, expected, atol=1e-6)


def test_zeroed_rows_of_a_neuron_leave_the_others(live: Live) -> None:
    """The rows of the file, weight and bias: the neuron is act(0) = 0, each other as it was."""
    for layer in dense_layers(live):
        before = inputs_of(live, live.model, "down_proj", layer)
        for bands in live.arch.gate_up_regions(Neuron(layer, 5)).values():
            edited = live.scaled([band.region for band in bands])
            after = inputs_of(live, edited, "down_proj", layer)
            assert (after[..., 5] == 0).all()
            others = [n for n in range(before.shape[-1]) if n != 5]
            assert torch.allclose(after[..., others], before[..., others], atol=1e-6)
            assert before[..., 5].abs().max() > 1e-3


def test_a_zeroed_neuron_region_is_a_zeroed_neuron(live: Live) -> None:
    def drop(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        activations = inputs[0].clone()
        activations[..., 5] = 0
        return (activations, *inputs[1:])

    for layer in dense_layers(live):
        edited = live.scaled([live.arch.neuron_region(Neuron(layer, 5))])
        with live.arch.module(live.model, "down_proj", layer).register_forward_pre_hook(drop):
            expected = logits(live.model)
        limit = NOISE_FACTOR * noise(live.base)
        assert abs(expected - logits(live.model)).max() > 20 * limit
        assert abs(logits(edited) - expected).max() <= limit


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("expert", [0, 2])
def test_an_experts_neuron_is_one_of_the_experts_transformers_runs(
    name: str, expert: int, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Its parameters are sliced as the live module's own forward slices them. Zeroing the neuron in
    the file, where it is read and where it is computed, is zeroing it there."""
    live = Live(name, base_of(name), tmp_path)
    experts = live.model.base_model.layers[1].mlp.experts
    neuron, limit = Neuron(1, 7, expert), NOISE_FACTOR * noise(live.base)
    before = logits(live.model)
    kept = experts.down_proj.detach().clone()
    with torch.no_grad():
        experts.down_proj[expert, :, 7] = 0
        expected = logits(live.model)
        experts.down_proj.copy_(kept)
    assert abs(expected - before).max() > 20 * limit
    regions = [live.arch.neuron_region(neuron)]
    regions += [band.region for part in live.arch.gate_up_regions(neuron).values() for band in part]
    assert len(regions) == 3
    for region in regions:
        assert abs(logits(live.scaled([region])) - expected).max() <= limit
    with torch.no_grad():  # the linear half of a gated neuron, by the order of chunk(2)
        experts.gate_up_proj[expert].chunk(2)[1][7] *= -3
        expected = logits(live.model)
    [up] = live.arch.gate_up_regions(neuron)["up"]
    assert abs(logits(live.scaled([up.region], -3.0)) - expected).max() <= limit
