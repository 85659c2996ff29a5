"""`heads` touches the slice of the output projection that reads a head, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inputs import random, write_means
from models import FAMILIES
from recipes import apply_edits, plan_of, stored
from safetensors.numpy import load_file, save_file

from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError, EditError

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


@pytest.mark.parametrize("mean_first", [True, False])
@pytest.mark.parametrize("band", [1 << 20, 300])
def test_a_mean_reaches_the_bias_through_the_weights_earlier_edits_left(
    mean_first: bool,
    band: int,
    base_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many bands the matrix has."""
    monkeypatch.setattr("surgery.editor.SLAB_BYTES", band)
    write_means(tmp_path, base_of("gpt2"))
    mean = {"op": "heads", "heads": ["L1H2", "L1H0"], "mean": {"file": "means.safetensors"}}
    box = random(4, 32, seed=9)
    save_file({O_PROJ["gpt2"]: box}, tmp_path / "box.safetensors")
    patch = {"op": "tensor", "file": "box.safetensors", "at": {O_PROJ["gpt2"]: [16, 0]}}
    edits = [mean, patch] if mean_first else [patch, mean]
    output = apply_edits(tmp_path, base_of("gpt2"), edits, allow_overlap=True)
    weight, means = (
        stored(base_of("gpt2"), O_PROJ["gpt2"]),
        load_file(tmp_path / "means.safetensors"),
    )
    if not mean_first:
        weight = weight.copy()
        weight[16:20] = box
    z = np.zeros((4, 8))
    z[[0, 2]] = means["mean"][1, [0, 2]]
    bias = O_PROJ["gpt2"].replace("weight", "bias")
    added = stored(output, bias) - stored(base_of("gpt2"), bias).astype(float)
    np.testing.assert_allclose(added, z.ravel() @ weight, atol=1e-5)


@pytest.mark.parametrize(
    ("means", "said"),
    [
        (
            {"mean": np.zeros((2, 4, 16), np.float32)},
            r"'mean' has shape \[2, 4, 16\]; .*\[2, 4, 8\]",
        ),
        ({"mean": np.full((2, 4, 8), np.nan, np.float32)}, "'mean' holds NaN"),
        ({"other": np.zeros((2, 4, 8), np.float32)}, "has no tensor 'mean'; it holds 'other'"),
    ],
)
def test_means_that_are_none_are_refused(
    means: dict[str, Any], said: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    save_file(means, tmp_path / "means.safetensors")
    edit = {"op": "heads", "heads": ["L1H2"], "mean": {"file": "means.safetensors"}}
    with pytest.raises((EditError, CheckpointError), match=said):
        plan_of(tmp_path, base_of("gpt2"), [edit])
