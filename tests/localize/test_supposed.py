"""The models that a wrong graph of an edited model is held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes import apply_edits

from surgery.checkpoint import Checkpoint
from surgery.localize.supposed import _again, _half, _twice, write_edit
from tests.models import Zoo

EDIT = {"op": "heads", "heads": ["L0H1"], "factor": 0.5}
WEIGHT = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(("weights", "factor"), [(_half, 0.75), (_twice, 0.0), (_again, 0.25)])
def test_a_supposed_model_has_the_edit_otherwise_and_nothing_else(
    zoo: Zoo, tmp_path: Path, weights: Any, factor: float
) -> None:
    original = zoo.checkpoint("llama")
    edited = apply_edits(tmp_path, original, [EDIT])
    folder = tmp_path / "supposed"
    folder.mkdir()
    write_edit(original, edited, weights, folder)
    before, made = Checkpoint.open(original), Checkpoint.open(folder)
    for name in before.tensors:
        expected = before.read(name).copy()
        if name == WEIGHT:
            expected[:, 8:16] *= np.float32(factor)
        np.testing.assert_array_equal(made.read(name), expected)
