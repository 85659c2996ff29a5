"""`layers` scales what blocks write, weights and biases, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models import FAMILIES
from recipes import apply_edits, plan_of, stored

from surgery.checkpoint import Checkpoint
from surgery.errors import InputError

WRITTEN = {
    "gpt2": {"attn": "h.1.attn.c_proj.", "mlp": "h.1.mlp.c_proj."},
    "llama": {"attn": "layers.1.self_attn.o_proj.", "mlp": "layers.1.mlp.down_proj."},
    "qwen3": {"attn": "layers.1.self_attn.o_proj.", "mlp": "layers.1.mlp.down_proj."},
    "bert": {"attn": "layer.1.attention.output.dense.", "mlp": "layer.1.output.dense."},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["attn", "mlp", "both"])
def test_weights_and_biases_of_the_part_are_scaled(
    family: str, part: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of(family)
    edit = {"op": "layers", "layers": [1], "part": part, "factor": -1.5}
    output = apply_edits(tmp_path, base, [edit])
    parts = ["attn", "mlp"] if part == "both" else [part]
    places = [WRITTEN[family][part] for part in parts]
    changed = 0
    for name in Checkpoint.open(base).tensors:
        factor = np.float32(-1.5 if any(place in name for place in places) else 1)
        changed += factor != 1
        assert (stored(output, name) == stored(base, name) * factor).all(), name
    assert changed == len(parts) * (2 if family in ("gpt2", "bert") else 1)


def test_it_commutes_with_heads_and_clashes_with_itself(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    layers, heads = {"op": "layers", "layers": "0-1"}, {"op": "heads", "heads": ["L0H1"]}
    assert plan_of(tmp_path, base_of("llama"), [layers, heads]).steps
    with pytest.raises(InputError, match="both change"):
        plan_of(tmp_path, base_of("llama"), [layers, {**layers, "layers": [1]}])


@pytest.mark.parametrize("layers", [[], [2], "1-2", "none", [1, 1]])
def test_layers_that_are_not_there_are_refused(
    layers: object, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError):
        plan_of(tmp_path, base_of("llama"), [{"op": "layers", "layers": layers}])
