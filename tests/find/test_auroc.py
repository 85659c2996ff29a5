"""The area under the ROC curve, by counting every pair; responses, by looking at every token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Zoo

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.export.load import load_model
from surgery.export.tasks import find_task
from surgery.find.scores.auroc import auroc, peaks

Few = st.lists(st.integers(-2, 2), min_size=1, max_size=6)
"""Few values, so that many tie."""


@given(positive=Few, negative=Few)
def test_the_area_is_how_often_a_positive_is_above_a_negative(
    positive: list[int], negative: list[int]
) -> None:
    pairs = [1.0 if p > q else 0.5 if p == q else 0.0 for p in positive for q in negative]
    found = auroc(np.array(positive)[:, None], np.array(negative)[:, None])
    assert found == pytest.approx([sum(pairs) / len(pairs)])


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("gpt2", "transformer.h.{}.mlp.c_fc"),
        ("llama", "model.layers.{}.mlp.gate_proj"),
        ("phi3", "model.layers.{}.mlp.gate_up_proj"),
        ("opt", "model.decoder.layers.{}.fc1"),
    ],
)
def test_a_response_is_the_largest_output_before_the_activation(
    zoo: Zoo, family: str, path: str
) -> None:
    folder = zoo.checkpoint(family)
    arch, model = (
        identify(Checkpoint.open(folder)),
        load_model(folder, find_task("causal-lm"), "float32"),
    )
    rows = [[5, 6, 7, 8], [9, 10]]
    ids = torch.tensor([rows[0], [0, 0, *rows[1]]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1) * mask}
    found = peaks(model, arch, inputs)
    for number, row in enumerate(rows):
        for layer in range(2):
            outputs: list[Any] = []
            module = model.get_submodule(path.format(layer))
            hook = module.register_forward_hook(lambda m, i, o, to=outputs: to.append(o))
            with torch.no_grad():
                model(input_ids=torch.tensor([row]))
            hook.remove()
            tokens = outputs[0].reshape(len(row), -1)
            wanted = [max(float(token[n]) for token in tokens) for n in range(found.shape[2])]
            np.testing.assert_allclose(found[number, layer], wanted, rtol=0, atol=1e-5)
