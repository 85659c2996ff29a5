"""`head_spectrum` against full decompositions of W_OV and W_QK, written out family by family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import FAMILIES
from recipes import apply_edits, plan_of, stored

from surgery.checkpoint import Checkpoint
from surgery.errors import InputError

Matrix = np.ndarray[Any, Any]


def band(size: int, index: int) -> slice:
    return slice(index * size, (index + 1) * size)


def circuits(family: str, folder: Path, layer: int, head: int) -> dict[str, Matrix]:
    """W_Q, W_K, W_V [width, head_dim] and W_O [head_dim, width] of a head, in row vectors."""
    if family == "gpt2":
        qkv = stored(folder, f"transformer.h.{layer}.attn.c_attn.weight")
        output = stored(folder, f"transformer.h.{layer}.attn.c_proj.weight")[band(8, head)]
        parts = [qkv[:, 32 * part :][:, band(8, head)] for part in range(3)]
    else:
        names = {
            "bert": ("bert.encoder.layer.{}.attention.self.", ("query", "key", "value")),
        }.get(family, ("model.layers.{}.self_attn.", ("q_proj", "k_proj", "v_proj")))
        prefix = names[0].format(layer)
        size = 16 if family == "qwen3" else 8
        shared = 1 if family == "bert" else 2
        parts = [
            stored(folder, f"{prefix}{name}.weight")[
                band(size, head if part == 0 else head // shared)
            ].T
            for part, name in enumerate(names[1])
        ]
        last = prefix.replace("self.", "output.dense.") if family == "bert" else f"{prefix}o_proj."
        output = stored(folder, f"{last}weight")[:, band(size, head)].T
    return dict(zip("qkvo", (part.astype(float) for part in (*parts, output)), strict=True))


def scaled(w: Matrix, components: list[int], factor: float) -> Matrix:
    u, s, vt = np.linalg.svd(w)
    s[components] *= factor
    return np.asarray((u * s) @ vt)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("factor", [0.0, 0.5, -2.0])
def test_components_of_what_a_head_writes_are_multiplied(
    factor: float, family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Under grouped-query attention, keys and values of the neighbour stay as they are."""
    base = base_of(family)
    edit = {"op": "head_spectrum", "heads": ["L1H3"], "components": [0, 4], "factor": factor}
    output = apply_edits(tmp_path, base, [edit])
    before, after = (circuits(family, folder, 1, 3) for folder in (base, output))
    expected = scaled(before["v"] @ before["o"], [0, 4], factor)
    assert np.abs(after["v"] @ after["o"] - expected).max() < 1e-6
    assert all((before[part] == after[part]).all() for part in "qkv")
    [edited] = plan_of(tmp_path, base, [edit]).edited
    for name in set(Checkpoint.open(base).tensors) - {edited}:
        assert (stored(base, name) == stored(output, name)).all()
    for head in range(3):
        others = (circuits(family, folder, 1, head)["o"] for folder in (base, output))
        assert np.array_equal(*others)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_components_of_what_a_head_attends_by_are_multiplied(
    family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of(family)
    edit = {"op": "head_spectrum", "heads": ["L0H2"], "components": [1], "circuit": "qk"}
    output = apply_edits(tmp_path, base, [{**edit, "factor": 0.25}])
    before, after = (circuits(family, folder, 0, 2) for folder in (base, output))
    expected = scaled(before["q"] @ before["k"].T, [1], 0.25)
    assert np.abs(after["q"] @ after["k"].T - expected).max() < 1e-6
    assert all((before[part] == after[part]).all() for part in "kvo")


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_folded_norm_gives_the_components_of_what_is_read_after_it(
    family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of(family)
    edit = {"op": "head_spectrum", "heads": ["L0H1"], "components": [0], "factor": 0.0}
    output = apply_edits(tmp_path, base, [{**edit, "fold_norm": True}])
    before, after = (circuits(family, folder, 0, 1) for folder in (base, output))
    name = (
        "transformer.h.0.ln_1.weight"
        if family == "gpt2"
        else "model.layers.0.input_layernorm.weight"
    )
    read = stored(base, name).astype(float)[:, None] * before["v"]
    if family == "gpt2":
        read = read - read.mean(axis=0)
    expected = scaled(read @ before["o"], [0], 0.0)
    assert np.abs(read @ after["o"] - expected).max() < 1e-6
    plain = scaled(before["v"] @ before["o"], [0], 0.0)
    assert np.abs(before["v"] @ after["o"] - plain).max() > 1e-3, "another component"


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "rotary": ("llama", {"circuit": "qk"}, "turns queries and keys by their positions"),
    "norms": ("qwen3", {"circuit": "qk"}, "normalises its queries"),
    "folded queries": ("gpt2", {"circuit": "qk", "fold_norm": True}, "W_Q alone cannot hold"),
    "no norm": ("bert", {"fold_norm": True}, "has no norm before attention"),
    "component": ("gpt2", {"components": [8]}, "component 8 .* components 0 to 7"),
    "twice": ("gpt2", {"components": [1, 1]}, "a component is named twice"),
    "head": ("gpt2", {"heads": ["L1H4"]}, "L1H4: head 4 is out of range"),
    "query head": ("gpt2", {"heads": ["L1H4"], "circuit": "qk"}, "L1H4: head 4 is out of range"),
    "layer": ("bert", {"heads": ["L2H0"], "circuit": "qk"}, "L2H0: layer 2 is out of range"),
    "no head": ("gpt2", {"heads": []}, "no head is selected"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_no_component_is_refused(
    why: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    family, fields, said = REFUSED[why]
    edit = {"op": "head_spectrum", "heads": ["L0H0"], "components": [0], **fields}
    with pytest.raises(InputError, match=said):
        plan_of(tmp_path, base_of(family), [edit])
