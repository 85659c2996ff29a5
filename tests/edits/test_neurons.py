"""`neurons` touches one column (Linear) or row (Conv1D) of the down projection per neuron."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models import FAMILIES
from recipes import apply_edits, stored

from surgery.checkpoint import Checkpoint

DOWN = {
    "gpt2": "transformer.h.0.mlp.c_proj.weight",
    "llama": "model.layers.0.mlp.down_proj.weight",
    "qwen3": "model.layers.0.mlp.down_proj.weight",
    "bert": "bert.encoder.layer.0.output.dense.weight",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_only_the_neurons_line_is_scaled(
    family: str, factor: float, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "n.csv").write_text("neuron,layer,score\n31,0,2\n7,0,9\n12,1,1\n")
    edit = {"op": "neurons", "file": "n.csv", "top": 2, "factor": factor}
    base, output = base_of(family), apply_edits(tmp_path, base_of(family), [edit])
    expected = stored(base, DOWN[family]).copy()
    lines = expected if family == "gpt2" else expected.T
    lines[[7, 31]] *= np.float32(factor)
    for name in Checkpoint.open(base).tensors:
        before = expected if name == DOWN[family] else stored(base, name)
        assert (stored(output, name) == before).all(), name
