"""What reads and writes the residual stream, and which norms lie between, by behaviour."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from live import (
    IDS,
    LAYERS,
    WIDTH,
    Live,
    band_of,
    block_input,
    block_output,
    dense_layers,
    inputs_of,
    live_writers,
    run,
    taken,
    whole_of,
)
from models import MODELS
from oracles import NOISE_FACTOR, logits, noise

from surgery.addresses import Neuron

ENCODERS = ("bert", "roberta", "distilbert")
DECODERS = tuple(name for name in MODELS if name not in ENCODERS)


def test_without_writers_nothing_of_the_input_is_in_the_stream(live: Live) -> None:
    weights = [w.tensor for w in live.arch.writers(range(LAYERS), True) if "bias" not in w.tensor]
    edited = live.scaled([whole_of(live, tensor) for tensor in weights])
    for layer in range(LAYERS):
        stream = block_output(live, edited, layer)
        assert torch.allclose(stream, stream[:1, :1].expand_as(stream), atol=1e-6)
    weights.remove(live.arch.name(live.arch.facts.tie.embed))
    edited = live.scaled([whole_of(live, tensor) for tensor in weights])
    assert block_output(live, edited, 0).std(dim=(0, 1)).max() > 1e-2


def test_without_readers_nothing_of_the_stream_is_written(live: Live) -> None:
    readers = list(live.arch.readers(range(LAYERS), False))
    edited = live.scaled([whole_of(live, reader.tensor) for reader in readers])
    places = [place for place in live_writers(live) if place[1] is not None]
    with taken(live.arch, edited, places) as kept:
        run(edited)
    for _, written in kept.values():
        assert torch.allclose(written, written[:1, :1].expand_as(written), atol=1e-6)


def test_writers_and_readers_have_the_stream_along_their_axis(live: Live) -> None:
    """A coordinate taken from every writer is not put out; one taken from every reader is not
    read: moved there, the input of each module leaves what it puts out."""
    coordinate, writers = 9, list(live.arch.writers(range(LAYERS), True))
    edited = live.scaled([band_of(live, w.tensor, w.axis, coordinate) for w in writers])
    with taken(live.arch, edited, live_writers(live)) as kept:
        run(edited)
    assert all((written[..., coordinate] == 0).all() for _, written in kept.values())
    assert all((written != 0).any() for _, written in kept.values())

    readers = list(live.arch.readers(range(LAYERS), True))
    edited = live.scaled([band_of(live, r.tensor, r.axis, coordinate) for r in readers])
    before = logits(edited)
    with moved(live, edited, coordinate):
        assert abs(logits(edited) - before).max() <= NOISE_FACTOR * noise(live.base)
    before = logits(live.model)
    with moved(live, live.model, coordinate):
        assert abs(logits(live.model) - before).max() > 1e-3


@contextmanager
def moved(live: Live, model: Any, coordinate: int) -> Iterator[None]:
    """One coordinate moved in what norms give to matrices; in what matrices take, without one."""

    def after(module: Any, inputs: Any, output: Any) -> Any:
        return output + 2 * unit

    def before(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] + 2 * unit, *inputs[1:])

    unit = torch.nn.functional.one_hot(torch.tensor(coordinate), WIDTH)
    places = set()
    for reader in live.arch.readers(range(LAYERS), True):
        role = live.arch.roles[reader.tensor]
        norm = live.arch.facts.modules[reader.norm] if reader.norm else None
        layer = role.layer if norm is None or norm.per_layer else None
        places.add((reader.norm or role.role, layer, norm is not None))
    with ExitStack() as stack:
        for name, layer, is_norm in places:
            module = live.arch.module(model, name, layer)
            register = module.register_forward_hook if is_norm else module.register_forward_pre_hook
            stack.enter_context(register(after if is_norm else before))
        yield


@pytest.mark.parametrize("live", DECODERS, indirect=True)
def test_a_block_adds_what_its_matrices_write(live: Live) -> None:
    """Each through its norm, where it has one."""
    for layer in range(LAYERS):
        places = [place for place in live_writers(live) if place[1] == layer]
        norms = [(live.arch.facts.modules[role].norm or role, layer) for role, _ in places]
        with taken(live.arch, live.model, norms) as kept:
            run(live.model)
        before, after = block_input(live, layer), block_output(live, live.model, layer)
        written = sum(output for _, output in kept.values())
        assert torch.allclose(after - before, written, atol=1e-5)


@pytest.mark.parametrize("live", ENCODERS, indirect=True)
def test_an_encoder_normalises_the_stream_with_what_is_written(live: Live) -> None:
    for layer in range(LAYERS):
        stream = block_input(live, layer)
        for place in [place for place in live_writers(live) if place[1] == layer]:
            norm = (live.arch.facts.modules[place[0]].norm or "", layer)
            with taken(live.arch, live.model, [place, norm]) as kept:
                run(live.model)
            assert torch.allclose(kept[norm][0], stream + kept[place][1], atol=1e-6)
            stream = kept[norm][1]
        assert torch.equal(block_output(live, live.model, layer), stream)


def test_the_first_block_reads_the_sum_of_the_embeddings(live: Live) -> None:
    places = [place for place in live_writers(live) if place[1] is None]
    norms = {live.arch.facts.modules[role].norm for role, _ in places} - {None}
    with taken(live.arch, live.model, [*places, *((norm, None) for norm in norms if norm)]) as kept:
        run(live.model)
    total = torch.as_tensor(sum(kept[place][1] for place in places))
    for norm in norms:
        assert torch.allclose(kept[norm, None][0], total, atol=1e-6)
        total = kept[norm, None][1]
    assert torch.allclose(block_input(live, 0), total, atol=1e-6)


def test_norms_lie_between_the_stream_and_the_matrices_that_name_them(live: Live) -> None:
    arch = live.arch
    matrices = [*arch.readers(range(LAYERS), True), *arch.writers(range(LAYERS), True)]
    for matrix in matrices:
        role = arch.roles[matrix.tensor]
        if matrix.norm is None or role.kind == "bias":
            continue
        fact = arch.facts.modules[matrix.norm]
        norm = (matrix.norm, role.layer if fact.per_layer else None)
        with taken(arch, live.model, [norm, (role.role, role.layer)]) as kept:
            run(live.model)
        read, written = kept[role.role, role.layer]
        if arch.facts.modules[role.role].reads:
            assert torch.equal(kept[norm][1], read), matrix
        elif arch.facts.norms != "post":
            assert torch.equal(kept[norm][0], written), matrix


def test_matrices_that_name_no_norm_read_the_stream_itself(live: Live) -> None:
    arch, model = live.arch, live.model
    for reader in arch.readers(range(LAYERS), True):
        role = arch.roles[reader.tensor]
        if reader.norm is not None:
            continue
        with taken(arch, model, [(role.role, role.layer)]) as kept:
            run(model)
        streams = [block_output(live, model, LAYERS - 1)]
        if role.layer is not None:
            with taken(arch, model, [("attention_norm", role.layer)]) as middle:
                run(model)
            streams = [block_input(live, role.layer), middle["attention_norm", role.layer][1]]
        read = kept[role.role, role.layer][0]
        assert any(torch.equal(read, stream) for stream in streams), reader


def test_whether_attention_and_mlp_read_the_same_stream(live: Live) -> None:
    [layer, *_] = dense_layers(live) or [0]
    edited = live.scaled([whole_of(live, live.arch.name("o_proj", layer))])
    role = (
        "router"
        if layer not in dense_layers(live)
        else next(
            live.arch.roles[bands[0].region.tensor].role
            for bands in live.arch.gate_up_regions(Neuron(layer, 0)).values()
        )
    )
    same = torch.equal(
        inputs_of(live, edited, role, layer), inputs_of(live, live.model, role, layer)
    )
    assert same is live.arch.facts.parallel


def test_norms_scale_by_their_weight_and_offset(live: Live) -> None:
    """With a weight of minus the offset a norm puts out its bias; LayerNorm takes the mean."""
    for role, fact in live.arch.facts.modules.items():
        if fact.type != "norm" or fact.root:
            continue
        layer = 0 if fact.per_layer else None
        norm = live.arch.module(live.model, role, layer)
        bias = getattr(norm, "bias", None)
        flat = torch.ones(1, norm.weight.shape[0]) * 3
        expected = torch.zeros_like(flat) if bias is None else bias.detach().expand_as(flat)
        with torch.no_grad():
            centred = torch.allclose(norm(flat), expected, atol=1e-6)
            assert centred is (live.arch.facts.norm == "layer")
            norm.weight.fill_(-live.arch.facts.norm_offset)
            assert torch.allclose(norm(torch.randn_like(flat)), expected, atol=1e-6)


def test_rotary_positions_and_the_scale_of_embeddings(live: Live) -> None:
    arch, base = live.arch, live.model.base_model
    turned: list[int] = []
    if hasattr(base, "rotary_emb"):

        def keep(module: Any, inputs: Any, output: Any) -> None:
            turned.append(output[0].shape[-1])

        base.rotary_emb.register_forward_hook(keep)
    embed = arch.module(live.model, arch.facts.tie.embed)
    with taken(arch, live.model, [(arch.facts.tie.embed, None)]) as kept:
        run(live.model)
    if live.name == "gptj":
        turned = [base.h[0].attn.embed_positions.shape[-1]]
    alibi = getattr(live.model.config, "alibi", live.name in ("bloom", "mpt"))
    learned = any("position" in name or "wpe" in name for name, _ in base.named_parameters())
    positions = "learned" if learned else "alibi" if alibi else "rotary"
    assert arch.facts.positions == positions
    assert arch.rotary_dim == (max(turned) if positions == "rotary" else 0)
    scale = WIDTH**0.5 if arch.facts.scaled_embedding else 1
    assert torch.allclose(kept[arch.facts.tie.embed, None][1], embed.weight[IDS] * scale, rtol=1e-4)
