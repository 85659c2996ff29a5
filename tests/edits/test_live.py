"""Parameters of live models are swapped where a tensor is used, and come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import load_model

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.edits.experts import written
from surgery.edits.live import swapped

EXPERTS = "model.layers.1.block_sparse_moe.experts"


def test_two_parts_of_one_parameter_change_and_come_back(base_of: Callable[..., Path]) -> None:
    arch, model = identify(Checkpoint.open(base_of("mixtral"))), load_model(base_of("mixtral"))
    stack = model.get_submodule("model.layers.1.mlp.experts").gate_up_proj
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    changes = {f"{EXPERTS}.1.w1.weight": torch.zeros_like, f"{EXPERTS}.2.w3.weight": torch.neg}
    expected = stack.detach().clone()
    expected[1, :48] = 0
    expected[2, 48:] *= -1
    with swapped(model, arch, changes):
        now = model.get_submodule("model.layers.1.mlp.experts").gate_up_proj
        assert torch.equal(now, expected)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_pair_is_swapped_together_as_long_as_it_stays_tied(
    tied: bool, base_of: Callable[..., Path]
) -> None:
    arch = replace(identify(Checkpoint.open(base_of("gpt2"))), tied=tied)
    model = load_model(base_of("gpt2"))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    before = head.weight.detach().clone()
    with swapped(model, arch, {"transformer.wte.weight": torch.zeros_like}):
        assert not embedding.weight.any()
        assert torch.equal(head.weight, torch.zeros_like(before) if tied else before)
    assert embedding.weight is head.weight
    assert torch.equal(head.weight, before)


def test_what_experts_write_sums_to_what_they_give(base_of: Callable[..., Path]) -> None:
    experts = load_model(base_of("mixtral")).get_submodule("model.layers.1.mlp.experts")
    torch.manual_seed(0)
    x, weight = torch.randn(5, 32), torch.rand(5, 2)
    index = torch.stack([torch.randperm(3)[:2] for _ in range(5)])
    with torch.no_grad():
        parts = [written(experts, (x, index, weight), expert, slice(None)) for expert in range(3)]
        assert torch.allclose(sum(parts), experts(x, index, weight), atol=1e-5)
