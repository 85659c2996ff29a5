"""What a model gives to tokens that follow is what its softmax says there, whatever runs beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from surgery.runtimes.forced import Continuation, force
from surgery.runtimes.interface import ModelRef
from surgery.runtimes.pytorch import TorchRuntime

ASKED = (
    Continuation((3, 4, 5), (6,)),
    Continuation((7,), (8, 9, 10, 11)),
    Continuation((1, 2, 3, 4, 5, 6, 7), (8, 8)),
    Continuation((5,), (5,)),
)


@pytest.fixture
def runtime(base_of: Callable[..., Path]) -> TorchRuntime:
    return TorchRuntime(ModelRef("torch", base_of("llama"), "causal-lm"), 1)


def by_hand(runtime: TorchRuntime, asked: Continuation) -> list[float]:
    """Each token alone: one run of all that is before it."""
    found = []
    for number, token in enumerate(asked.following):
        ids = torch.tensor([[*asked.prompt, *asked.following[:number]]])
        with torch.no_grad():
            logits = runtime.live(ids).logits[0, -1].double()
        found.append(float(torch.log_softmax(logits, dim=0)[token]))
    return found


@pytest.mark.parametrize("group", [1, 3, 8])
def test_every_token_has_the_log_probability_of_its_softmax(
    runtime: TorchRuntime, group: int
) -> None:
    found = force(runtime, ASKED, group)
    assert [len(row) for row in found] == [1, 4, 2, 1]
    for row, asked in zip(found, ASKED, strict=True):
        assert row == pytest.approx(by_hand(runtime, asked), abs=1e-5)
        assert all(value < 0 for value in row)


def test_nothing_is_not_asked(runtime: TorchRuntime) -> None:
    for prompt, following in (((), (1,)), ((1,), ())):
        with pytest.raises(ValueError, match="at least one token"):
            force(runtime, [Continuation(prompt, following)])
    assert force(runtime, []) == []


def test_logits_that_are_no_numbers_give_none(runtime: TorchRuntime) -> None:
    runtime.live.lm_head.weight.data[7] = float("nan")
    [row] = force(runtime, [Continuation((3,), (4,))])
    assert np.isnan(row).all()
