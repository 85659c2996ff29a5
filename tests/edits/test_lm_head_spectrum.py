"""`lm_head_spectrum` against numpy's own decomposition of the whole head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inputs import EMBED
from recipes import apply_edits, editor_of, plan_of, stored

import surgery.editor
from surgery.checkpoint import Checkpoint
from surgery.edits.spectrum import of_gram, of_product, signed
from surgery.errors import InputError

EDIT = {"op": "lm_head_spectrum", "components": [0, 3, 31], "factor": 0.25}


def rebuilt(w: np.ndarray[Any, Any], components: list[int], factor: float) -> np.ndarray[Any, Any]:
    """W with some singular values multiplied."""
    u, s, vt = np.linalg.svd(w.astype(float), full_matrices=False)
    s[components] *= factor
    return np.asarray((u * s) @ vt)


@pytest.mark.parametrize(("family", "head"), [
    ("gpt2", "lm_head.weight"), ("llama", "lm_head.weight"), ("qwen3", "lm_head.weight"),
    ("bert", "cls.predictions.decoder.weight"),
])  # fmt: skip
@pytest.mark.parametrize("factor", [0.0, 0.25, -3.0])
def test_the_chosen_singular_values_are_multiplied(
    factor: float, family: str, head: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of(family)
    edit = {**EDIT, "factor": factor}
    output = apply_edits(tmp_path, base, [edit], untie=True)
    before = stored(base, head if head in Checkpoint.open(base).tensors else EMBED[family])
    assert np.abs(stored(output, head) - rebuilt(before, [0, 3, 31], factor)).max() < 1e-6
    assert (stored(output, EMBED[family]) == stored(base, EMBED[family])).all()


def test_bands_make_no_difference(
    base_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of("llama")
    whole = editor_of(tmp_path, base, [EDIT]).unrounded("lm_head.weight")
    monkeypatch.setattr(surgery.editor, "SLAB_BYTES", 700)
    banded = editor_of(tmp_path, base, [EDIT]).unrounded("lm_head.weight")
    assert np.abs(whole - banded).max() < 1e-6


@given(seed=st.integers(0, 99), rows=st.integers(5, 20))
def test_vectors_of_the_gram_matrix_are_those_of_the_matrix(seed: int, rows: int) -> None:
    w = np.random.default_rng(seed).normal(size=(rows, 5))
    squares, vectors = of_gram(w.T @ w)
    _, s, vt = np.linalg.svd(w)
    assert np.allclose(squares[: len(s)], s**2)
    assert np.allclose(vectors, signed(vt.T), atol=1e-6)
    largest = np.abs(vectors).argmax(axis=0)
    assert (vectors[largest, np.arange(5)] > 0).all()


@given(seed=st.integers(0, 99), rank=st.integers(1, 4))
def test_vectors_of_a_product_are_those_of_the_product(seed: int, rank: int) -> None:
    left, right = np.random.default_rng(seed).normal(size=(2, 7, rank))
    u, squares, v = of_product(left, right)
    assert np.allclose(signed(u * np.sqrt(squares)) @ np.eye(rank), u * np.sqrt(squares))
    s = np.linalg.svd(left @ right.T, compute_uv=False)
    assert np.allclose(np.sqrt(squares), s[:rank])
    for i in range(rank):
        assert np.allclose(np.abs(u[:, i] @ left @ right.T @ v[:, i]), s[i])


def test_components_come_from_the_best_scores_and_from_presets(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    scores = "".join(f"{i},{(7 * i) % 32}\n" for i in range(32))
    (tmp_path / "s.csv").write_text(f"component,score\n{scores}")
    best = sorted(range(32), key=lambda i: -((7 * i) % 32))
    base, edit = base_of("llama"), {"op": "lm_head_spectrum", "file": "s.csv"}
    found = editor_of(tmp_path, base, [{**edit, "top": 4, "factor": 0.5}])
    assert found.plan.edits[0].components == tuple(best[:4])
    found = editor_of(tmp_path, base, [{**edit, "preset": "code"}])
    assert (found.plan.edits[0].components, found.plan.edits[0].factor) == (tuple(best[:5]), 0.1)
    found = editor_of(tmp_path, base, [{**edit, "preset": "note"}])
    assert (len(found.plan.edits[0].components), found.plan.edits[0].factor) == (32, 0.9)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "range": ({"components": [32]}, "component 32 is out of range; .* 0 to 31"),
    "twice": ({"components": [1, 1]}, "1 is named twice"),
    "none": ({"components": []}, "no component is selected"),
    "factor": ({"factor": None}, "give factor, or file with preset"),
    "preset": ({"preset": "code"}, "preset goes with file"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_choice_without_meaning_is_refused(
    why: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    fields, said = REFUSED[why]
    with pytest.raises(InputError, match=said):
        plan_of(tmp_path, base_of("llama"), [{**EDIT, **fields}])


def test_a_tie_is_not_broken_unasked(base_of: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="say untie: true"):
        plan_of(tmp_path, base_of("gpt2"), [EDIT])


def write_head(base: Path, folder: Path, head: np.ndarray[Any, Any]) -> dict[str, str]:
    from safetensors.numpy import save_file

    save_file({"lm_head.weight": head.astype(np.float32)}, folder / "head.safetensors")
    return {"op": "tensor", "file": "head.safetensors"}


def test_equal_singular_values_have_no_directions_of_their_own(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of("llama")
    equal = write_head(base, tmp_path, np.eye(101, 32) * np.array([3, 2, 2] + [1] * 29))
    edit = {**EDIT, "components": [0, 1]}
    with pytest.raises(InputError, match=r"components 1 and 2 of .* same singular value"):
        apply_edits(tmp_path, base, [equal, edit], allow_overlap=True)
    both = {**EDIT, "components": [2, 1], "factor": 0.0}
    output = apply_edits(tmp_path, base, [equal, both], allow_overlap=True)
    left = np.linalg.svd(stored(output, "lm_head.weight"), compute_uv=False)
    assert np.allclose(left, [3] + [1] * 29 + [0, 0], atol=1e-6)


def test_a_head_with_nans_has_no_spectrum(base_of: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.numpy import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(base_of("llama"), base)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][5, 5] = np.nan
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"'lm_head.weight' holds NaN or infinities"):
        apply_edits(tmp_path, base, [EDIT])
