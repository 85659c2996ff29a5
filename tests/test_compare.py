"""`diff-weights`: which tensors differ, in which rows and columns, by how much."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from recipes import HEADS, apply_edits, make_sae, sae_edit, stored

from surgery.compare import diff_weights
from surgery.console.words import spans


def test_a_checkpoint_equals_itself(base_of: Callable[..., Path]) -> None:
    found = diff_weights(base_of("llama"), base_of("llama"))
    assert found.changed == ()
    assert found.equal == 21


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("band", [1 << 20, 256])
def test_a_zeroed_head_is_its_columns_and_their_rank(
    base_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    band: int,
) -> None:
    """Read in one band or in many."""
    monkeypatch.setattr("surgery.editor.SLAB_BYTES", band)
    base = base_of("llama", dtype)
    edited = apply_edits(tmp_path, base, [{**HEADS, "heads": ["L0H1"]}])
    (change,) = diff_weights(base, edited).changed
    before = stored(base, change.name).astype(np.float64)
    assert change.name == "model.layers.0.self_attn.o_proj.weight"
    assert change.rows == tuple(range(32))
    assert change.columns == tuple(range(8, 16))
    assert change.rank == np.linalg.matrix_rank(before[:, 8:16])
    assert change.frobenius == pytest.approx(np.linalg.norm(before[:, 8:16]))
    assert change.max_abs == np.abs(before[:, 8:16]).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_projecting_out_k_directions_is_a_change_of_rank_k(
    base_of: Callable[..., Path], tmp_path: Path, dtype: str
) -> None:
    base = base_of("llama", dtype)
    make_sae(tmp_path / "sae", "blocks.1.hook_resid_post", 32)
    edited = apply_edits(tmp_path, base, [sae_edit("orthogonalize", features=[1, 4])])
    matrices = [change for change in diff_weights(base, edited).changed if change.rank]
    assert len(matrices) == 5
    assert {change.rank for change in matrices} == {2}


def test_tensors_that_cannot_be_compared_are_named(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    found = diff_weights(base_of("llama"), base_of("llama", "bfloat16"))
    assert len(found.other_form) == 21
    assert not found.same
    make_sae(tmp_path / "sae", "blocks.1.hook_mlp_out", 32)
    steered = apply_edits(tmp_path, base_of("llama"), [sae_edit("steer_bias")])
    found = diff_weights(base_of("llama"), steered)
    assert "model.layers.0.mlp.up_proj.bias" in found.only_b
    assert not (found.changed or found.only_a or found.other_form)


def test_a_change_of_nan_bits_is_a_change(base_of: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    for folder, payload in (("a", 0x7FC00000), ("b", 0x7FC00001)):
        tensors = load_file(base_of("gpt2") / "model.safetensors")
        tensors["transformer.ln_f.bias"].view("u4")[0] = payload
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
        config = json.loads((base_of("gpt2") / "config.json").read_text())
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    (change,) = diff_weights(tmp_path / "a", tmp_path / "b").changed
    assert change.name == "transformer.ln_f.bias"


def test_spans_join_neighbours() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert spans(None) == "–"
