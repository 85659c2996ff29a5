"""Editing in bands of rows: the size of a band changes the memory, not the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import FAMILIES
from recipes import HEADS, NEURONS, apply_edits, make_sae, sae_edit, stored, weight_files

from surgery.checkpoint import TensorInfo
from surgery.editor import bands, row_bytes
from surgery.verify import ulp_distance, verify


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (7,), (5, 3), (3, 2, 2)])
def test_bands_tile_a_tensor_in_row_order(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.editor.SLAB_BYTES", 16)
    nbytes = 4 * int(np.prod(shape))
    info = TensorInfo("w", "F32", shape, 8, 8 + nbytes, "f")
    tensor = np.arange(int(np.prod(shape))).reshape(shape)
    parts = [tensor[rows.slices] for rows in bands(info)]
    assert np.array_equal(np.concatenate(parts) if shape else parts[0], tensor)
    if shape and nbytes:
        assert all(part.size * 4 <= max(16, row_bytes(info)) for part in parts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("edit", ["heads", "neurons", "orthogonalize", "z_project"])
def test_small_bands_give_the_same_checkpoint_to_the_last_bit_of_rounding(
    base_of: Callable[..., Path],
    tmp_path: Path,
    family: str,
    edit: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = base_of(family, **({"tie_word_embeddings": False} if family != "bert" else {}))
    edits = {"heads": HEADS, "neurons": NEURONS}.get(edit) or sae_edit(edit)
    if edit == "orthogonalize":
        edits = {**edits, "approximate": family == "bert"}
    results = []
    for name, size in (("whole", 1 << 20), ("bands", 200)):
        monkeypatch.setattr("surgery.editor.SLAB_BYTES", size)
        results.append(_apply(tmp_path / name, base, edits, family))
        assert verify(results[-1], base, results[-1].parent / "recipe.json").ok
    if edit in ("heads", "neurons"):
        assert weight_files(results[0]) == weight_files(results[1])
    for tensor in _tensors(results[0]):
        a, b = (stored(folder, tensor) for folder in results)
        # A sum in another order may fall on the other side of a half: one rounding apart.
        assert ulp_distance(a, b).max() <= 1, tensor


def _apply(folder: Path, base: Path, edit: dict[str, Any], family: str) -> Path:
    hook, width = "blocks.1.hook_resid_post", 32
    if edit.get("patch") == "z_project":
        hook, width = "blocks.1.attn.hook_z", 64 if family == "qwen3" else 32
    make_sae(folder / "sae", hook, width)
    return apply_edits(folder, base, [edit], untie=True)


def _tensors(folder: Path) -> list[str]:
    from surgery.checkpoint import Checkpoint

    return list(Checkpoint.open(folder).tensors)
