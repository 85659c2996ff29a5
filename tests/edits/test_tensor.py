"""`tensor` writes the given numbers where it is told to, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inputs import EMBED, SQUARE, random
from models import FAMILIES
from oracles import forward_hooks, load_model, logits
from recipes import apply_edits, plan_of, stored

from surgery.checkpoint import Checkpoint
from surgery.errors import InputError


def write(folder: Path, tensors: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    from safetensors.torch import save_file

    converted = {name: torch.as_tensor(array).to(dtype) for name, array in tensors.items()}
    save_file(converted, folder / "p.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", [None, (0, 0), (23, 5)])
def test_the_box_and_nothing_else_changes(
    family: str, start: tuple[int, int] | None, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    name, base = SQUARE[family].format(1), base_of(family)
    expected = stored(base, name).copy()
    given = random(*expected.shape) if start is None else random(9, 6)
    row, column = start or (0, 0)
    expected[row : row + given.shape[0], column : column + given.shape[1]] = given
    write(tmp_path, {name: given})
    at = {} if start is None else {"at": {name: list(start)}}
    output = apply_edits(tmp_path, base, [{"op": "tensor", "file": "p.safetensors", **at}])
    for tensor in Checkpoint.open(base).tensors:
        found = stored(output, tensor)
        assert (found == (expected if tensor == name else stored(base, tensor))).all(), tensor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", ["float64", "float32", "bfloat16"])
def test_numbers_of_any_float_type_are_rounded_to_the_stored_one(
    dtype: torch.dtype, storage: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    name = SQUARE["llama"].format(0)
    write(tmp_path, {name: random(32, 32)}, dtype)
    edit = {"op": "tensor", "file": "p.safetensors"}
    output = apply_edits(tmp_path, base_of("llama", storage), [edit])
    expected = torch.from_numpy(random(32, 32)).to(dtype).to(getattr(torch, storage))
    assert (stored(output, name).astype(float) == expected.double().numpy()).all()


def test_the_models_own_numbers_change_no_byte(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    base = base_of("gpt2", "bfloat16")
    tensors = load_file(base / "model.safetensors")
    write(tmp_path, tensors, torch.bfloat16)
    output = apply_edits(tmp_path, base, [{"op": "tensor", "file": "p.safetensors"}], untie=True)
    assert len(tensors) > 20
    for name in tensors:
        assert Checkpoint.open(output).read_bytes(name) == Checkpoint.open(base).read_bytes(name)


def test_the_head_of_a_tied_model_can_be_given_once_it_is_untied(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """The head becomes a multiple of the embedding; what the model reads stays."""
    base = base_of("qwen3")
    embed = stored(base, EMBED["qwen3"])
    write(tmp_path, {"lm_head.weight": 3 * embed})
    edit = {"op": "tensor", "file": "p.safetensors"}
    with pytest.raises(InputError, match="say untie: true"):
        plan_of(tmp_path, base, [edit])
    output = apply_edits(tmp_path, base, [edit], untie=True)
    model = load_model(base)
    with forward_hooks(model, outputs={"lm_head": lambda x: 3 * x}):
        expected = logits(model)
    assert np.allclose(logits(load_model(output)), expected, rtol=1e-5, atol=1e-5)
    assert (stored(output, EMBED["qwen3"]) == embed).all()


NAME = SQUARE["llama"].format(0)
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "name": ({"model.layer.0.w": random(3)}, {}, "this llama model has no 'model.layer.0.w'"),
    "shape": ({NAME: random(32, 31)}, {}, r"shape \[32, 31\], .* of this model \[32, 32\]"),
    "end": ({NAME: random(9, 4)}, {NAME: [24, 0]}, r"does not fit at \[24, 0\]"),
    "axes": ({NAME: random(9)}, {NAME: [0]}, r"does not fit at \[0\]"),
    "more axes": ({NAME: random(9, 4)}, {NAME: [0]}, r"does not fit at \[0\]"),
    "at": ({NAME: random(32, 32)}, {"x": [0, 0]}, "at names 'x', which .* does not hold"),
    "nothing": ({}, {}, "holds no tensor"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_fit_is_refused(
    why: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    tensors, at, said = REFUSED[why]
    write(tmp_path, tensors)
    edit = {"op": "tensor", "file": "p.safetensors", "at": at}
    with pytest.raises(InputError, match=said):
        plan_of(tmp_path, base_of("llama"), [edit])


def test_integers_and_nans_are_refused(base_of: Callable[..., Path], tmp_path: Path) -> None:
    edit = {"op": "tensor", "file": "p.safetensors"}
    write(tmp_path, {NAME: np.ones((32, 32))}, torch.int32)
    with pytest.raises(InputError, match="is stored as I32; expected F64"):
        plan_of(tmp_path, base_of("llama"), [edit])
    write(tmp_path, {NAME: np.full((32, 32), np.nan)})
    with pytest.raises(InputError, match=r"at \[0, 0\] into nan"):
        apply_edits(tmp_path, base_of("llama"), [edit])
