"""`heads` touches the slice of the output projection that reads a head, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import FAMILIES
from recipes import apply_edits, plan_of, stored

from surgery.checkpoint import Checkpoint

O_PROJ = {
    "gpt2": "transformer.h.1.attn.c_proj.weight",
    "llama": "model.layers.1.self_attn.o_proj.weight",
    "qwen3": "model.layers.1.self_attn.o_proj.weight",
    "bert": "bert.encoder.layer.1.attention.output.dense.weight",
}
SLICES: dict[str, Any] = {
    "gpt2": np.s_[16:24],
    "llama": np.s_[:, 16:24],
    "qwen3": np.s_[:, 32:48],
    "bert": np.s_[:, 16:24],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("factor", [0.0, -0.5, 3.0])
def test_only_the_heads_slice_is_scaled(
    family: str, factor: float, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Shared keys and values of grouped-query attention stay, and so do biases."""
    edit = {"op": "heads", "heads": ["L1H2"], "factor": factor}
    base, output = base_of(family), apply_edits(tmp_path, base_of(family), [edit])
    expected = stored(base, O_PROJ[family]).copy()
    expected[SLICES[family]] *= np.float32(factor)
    for name in Checkpoint.open(base).tensors:
        before = expected if name == O_PROJ[family] else stored(base, name)
        assert (stored(output, name) == before).all(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_all_heads_are_the_whole_projection_once(
    family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    edit = {"op": "heads", "heads": [f"L{layer}H{head}" for layer in (0, 1) for head in range(4)]}
    plan = plan_of(tmp_path, base_of(family), [edit])
    [shape] = {plan.tensors[name].shape for name in plan.edited}
    assert sum(step.target.region.size for step in plan.steps) == 2 * shape[0] * shape[1]
    assert len(plan.edited) == 2
