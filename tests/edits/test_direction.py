"""`direction` leaves nothing along r, keeps norms where told to, and names what it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inputs import random, write_vector
from models import FAMILIES
from recipes import apply_edits, plan_of, stored
from safetensors.numpy import save_file

from surgery.addresses import Region
from surgery.checkpoint import Checkpoint
from surgery.edits.direction import NormKeepingDirection
from surgery.edits.projection import along_rows, project
from surgery.errors import InputError

EDIT = {"op": "direction", "vector": {"file": "d.safetensors", "key": "d"}, "approximate": True}
LINEAR_WRITERS = ("o_proj", "down_proj", "attention.output.dense", "output.dense")


def written_axis(name: str) -> int:
    """The axis of residual width: rows of a Linear and biases, else columns."""
    linear = any(f"{part}.weight" in name for part in LINEAR_WRITERS)
    return 0 if linear or name.endswith(".bias") else 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep_norms", ["none", "columns"])
def test_nothing_is_left_along_the_direction(
    family: str, keep_norms: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of(family)
    write_vector(tmp_path, base)
    r = random(32).astype(float) / np.linalg.norm(random(32))
    edit = {**EDIT, "keep_norms": keep_norms}
    plan = plan_of(tmp_path, base, [edit], untie=True)
    output = apply_edits(tmp_path, base, [edit], untie=True)
    assert len(plan.edited) >= 5
    for name in plan.edited:
        axis = written_axis(name)
        before, after = (stored(folder, name).astype(float) for folder in (base, output))
        assert np.abs(np.tensordot(r, after, axes=(0, axis))).max() < 1e-6, name
        if keep_norms == "columns" and after.ndim == 2:
            lengths = [np.linalg.norm(w, axis=axis) for w in (before, after)]
            assert np.allclose(*lengths, rtol=1e-5), name
        else:
            expected = before - np.multiply.outer(
                *((r, np.tensordot(r, before, axes=(0, axis))) if axis == 0 else (before @ r, r))
            )
            assert np.abs(after - expected).max() < 1e-6, name


class Whole:
    """A reader of one array, in bands of two rows."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def rows(self, tensor: str) -> Any:
        for start in range(0, len(self.array), 2):
            yield slice(start, start + 2), self.array[start : start + 2]


@given(seed=st.integers(0, 99), strength=st.floats(-2, 2), rows=st.integers(2, 9))
def test_what_is_left_is_the_part_that_strength_leaves(
    seed: int, strength: float, rows: int
) -> None:
    rng = np.random.default_rng(seed)
    w, q = rng.normal(size=(rows, 7)), rng.normal(size=(rows, 1))
    q /= np.linalg.norm(q)
    along = along_rows("w", q, 0, Whole(w))
    left = project(w, q, strength, Region.whole("w", w.shape), along)
    assert np.allclose(q.T @ left, (1 - strength) * (q.T @ w), atol=1e-12)
    other = project(w.T.copy(), q, strength, Region.whole("w", w.T.shape), None)
    assert np.allclose(other, left.T, atol=1e-12)


@given(seed=st.integers(0, 99), strength=st.floats(-2, 2).filter(lambda s: s != 0))
def test_norms_are_kept_whatever_the_strength_but_for_vectors_along_the_direction(
    seed: int, strength: float
) -> None:
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(6, 1))
    q /= np.linalg.norm(q)
    rows = np.concatenate([rng.normal(size=(4, 6)), np.zeros((1, 6)), 3 * q.T])
    edit = NormKeepingDirection(q, strength, (0,), True, None)
    left = edit.transform(rows, Region.whole("w", rows.shape), {"w": None})
    before, after = (np.linalg.norm(w, axis=1) for w in (rows, left))
    assert np.allclose(before[:5], after[:5], rtol=1e-9)


def test_what_is_left_of_a_vector_along_the_direction_is_not_blown_up() -> None:
    """At strength 1 it is rounding, which no factor turns into what was there."""
    q = random(6, 1).astype(float)
    q /= np.linalg.norm(q)
    rows = np.concatenate([3 * q.T, 3 * q.T + 1e-6 * random(1, 6), random(1, 6)])
    edit = NormKeepingDirection(q, 1.0, (0,), True, None)
    for axis, slab in ((1, rows), (0, rows.T.copy())):
        along = along_rows("w", q, axis, Whole(slab))
        state = None if along is None else edit.columns("w", along, Whole(slab))
        left = edit.transform(slab, Region.whole("w", slab.shape), {"w": state})
        lengths = np.linalg.norm(left, axis=axis)
        assert (lengths[:2] < 1e-5).all()
        assert np.isclose(lengths[2], np.linalg.norm(rows[2]))


@pytest.mark.parametrize(
    ("fields", "suffixes"),
    [
        (
            {"matrices": ["o_proj"], "layers": [1]},
            {"h.1.attn.c_proj.weight", "h.1.attn.c_proj.bias"},
        ),
        ({"matrices": ["position_embed"]}, {"wpe.weight"}),
    ],
)
def test_only_the_named_roles_are_written(
    fields: dict[str, Any], suffixes: set[str], base_of: Callable[..., Path], tmp_path: Path
) -> None:
    write_vector(tmp_path, base_of("gpt2"))
    plan = plan_of(tmp_path, base_of("gpt2"), [{**EDIT, **fields}])
    assert set(plan.edited) == {f"transformer.{suffix}" for suffix in suffixes}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "role": ({"matrices": ["up_proj"]}, "'up_proj'; what writes .* is embed, o_proj, down_proj"),
    "no role": ({"matrices": []}, "an empty list"),
    "width": ({"vector": {"file": "d.safetensors", "key": "long"}}, r"shape \[33\]; .* has \[32\]"),
    "matrix": ({"vector": {"file": "d.safetensors", "key": "flat"}}, r"shape \[1, 32\]"),
    "zero": ({"vector": {"file": "d.safetensors", "key": "zero"}}, "has norm 0.0"),
    "nan": ({"vector": {"file": "d.safetensors", "key": "nan"}}, "has norm nan"),
    "key": ({"vector": {"file": "d.safetensors", "key": "e"}}, "has no tensor 'e'; it holds"),
    "layer": ({"layers": [2]}, "layer 2 is out of range"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_no_direction_of_this_model_is_refused(
    why: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    fields, said = REFUSED[why]
    vectors = {"d": random(32), "long": random(33), "flat": random(1, 32), "zero": 0 * random(32)}
    save_file({**vectors, "nan": random(32) + np.float32(np.nan)}, tmp_path / "d.safetensors")
    with pytest.raises(InputError, match=said):
        plan_of(tmp_path, base_of("llama"), [{**EDIT, **fields}])


def test_keeping_norms_does_not_commute_with_what_mixes_inputs(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    write_vector(tmp_path, base_of("llama"))
    heads = {"op": "heads", "heads": ["L0H1"]}
    assert plan_of(tmp_path, base_of("llama"), [EDIT, heads]).steps
    with pytest.raises(InputError, match="both change"):
        plan_of(tmp_path, base_of("llama"), [{**EDIT, "keep_norms": "columns"}, heads])


def test_tensors_outside_the_writers_are_untouched(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of("llama", "bfloat16")
    write_vector(tmp_path, base)
    plan = plan_of(tmp_path, base, [EDIT])
    output = apply_edits(tmp_path, base, [EDIT])
    for name in set(Checkpoint.open(base).tensors) - set(plan.edited):
        assert Checkpoint.open(base).read_bytes(name) == Checkpoint.open(output).read_bytes(name)
