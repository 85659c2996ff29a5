"""`low_rank` adds scale · u vᵀ, u along what a module gives and v along what it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inputs import EMBED, SQUARE, UP, orientation, random, write_factors
from models import FAMILIES
from oracles import assert_equivalent, forward_hooks
from recipes import apply_edits, editor_of, plan_of, stored
from safetensors.numpy import load_file, save_file

from surgery.errors import InputError

EDIT = {"op": "low_rank", "file": "uv.safetensors"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_product_is_added_in_stored_order(
    family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of(family)
    write_factors(tmp_path, base)
    output = apply_edits(tmp_path, base, [{**EDIT, "scale": 0.7}], untie=True)
    factors = load_file(tmp_path / "uv.safetensors")
    for name in (SQUARE[family].format(1), UP[family].format(1), EMBED[family]):
        u, v = (factors[f"{name}.{side}"].astype(float) for side in "uv")
        u, v = u.reshape(len(u), -1), v.reshape(len(v), -1)
        delta = 0.7 * u @ v.T
        flipped = family == "gpt2" or name == EMBED[family]
        expected = stored(base, name).astype(float) + (delta.T if flipped else delta)
        assert np.abs(stored(output, name) - expected).max() < 1e-6, name


def test_it_writes_u_where_it_reads_v(base_of: Callable[..., Path], tmp_path: Path) -> None:
    """By hand, through the module: what it says is read and written, not rows and columns."""
    import torch

    base, name = base_of("gpt2"), "transformer.h.1.mlp.c_proj"
    u, v = random(32), random(128, seed=5)
    save_file({f"{name}.weight.u": u, f"{name}.weight.v": v}, tmp_path / "uv.safetensors")
    editor = editor_of(tmp_path, base, [EDIT])
    seen = []

    def read(x: Any) -> Any:
        seen.append(x)
        return x

    def write(y: Any) -> Any:
        return y + (seen.pop() @ torch.from_numpy(v))[..., None] * torch.from_numpy(u)

    hooks = {"inputs": {name: read}, "outputs": {name: write}}
    assert_equivalent(editor, tmp_path / "out", lambda model: forward_hooks(model, **hooks))


REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "unpaired": ({"a.u": (3,)}, "without its pair: 'a.v'"),
    "stray": ({"a.u": (3,), "a.v": (3,), "a.w": (3,)}, "without its pair: 'a.w'"),
    "empty": ({}, "nothing there"),
    "unknown": ({"a.u": (3,), "a.v": (3,)}, "this llama model has no 'a'"),
    "outputs": ({"W.u": (31, 2), "W.v": (32, 2)}, r"has shape \[31, 2\]; .* has 48 outputs"),
    "inputs": ({"W.u": (48, 2), "W.v": (48, 2)}, r"has shape \[48, 2\]; .* has 32 inputs"),
    "rank": ({"W.u": (48, 2), "W.v": (32, 3)}, "has rank 2, .* rank 3"),
    "axes": ({"W.u": (48, 2, 1), "W.v": (32, 2)}, r"has shape \[48, 2, 1\]"),
    "norm": ({"N.u": (32,), "N.v": (1,)}, "input_norm.0.weight is no matrix"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_factors_that_do_not_fit_are_refused(
    why: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    shapes, said = REFUSED[why]
    names = {"W": UP["llama"].format(0), "N": "model.layers.0.input_layernorm.weight"}
    tensors = {
        names.get(key[:-2], key[:-2]) + key[-2:]: random(*shape) for key, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "uv.safetensors")
    with pytest.raises(InputError, match=said):
        plan_of(tmp_path, base_of("llama"), [EDIT])


def test_shapes_in_the_inputs_are_as_stored(base_of: Callable[..., Path]) -> None:
    """The helper of these tests, by hand."""
    assert orientation(base_of("gpt2"), UP["gpt2"].format(0)) == (128, 32)
    assert orientation(base_of("llama"), UP["llama"].format(0)) == (48, 32)
    assert orientation(base_of("llama"), EMBED["llama"]) == (32, 101)
