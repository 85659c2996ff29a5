"""`head_spectrum` against full decompositions of W_OV and W_QK, written out family by family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes import apply_edits, plan_of, stored

from surgery.checkpoint import Checkpoint
from surgery.errors import InputError

Matrix = np.ndarray[Any, Any]


def band(size: int, index: int) -> slice:
    return slice(index * size, (index + 1) * size)


OUTPUT = {
    "bert": "bert.encoder.layer.{}.attention.output.dense",
    "bloom": "transformer.h.{}.self_attention.dense",
    "falcon": "transformer.h.{}.self_attention.dense",
    "falcon-new": "transformer.h.{}.self_attention.dense",
    "falcon-rw": "transformer.h.{}.self_attention.dense",
    "gpt2": "transformer.h.{}.attn.c_proj",
    "mpt": "transformer.blocks.{}.attn.out_proj",
    "opt": "model.decoder.layers.{}.self_attn.out_proj",
}
FUSED = {
    "bloom": "transformer.h.{}.self_attention.query_key_value",
    "falcon": "transformer.h.{}.self_attention.query_key_value",
    "falcon-new": "transformer.h.{}.self_attention.query_key_value",
    "falcon-rw": "transformer.h.{}.self_attention.query_key_value",
    "gpt2": "transformer.h.{}.attn.c_attn",
    "mpt": "transformer.blocks.{}.attn.Wqkv",
    "phi3": "model.layers.{}.self_attn.qkv_proj",
}
APART = {
    "bert": ("bert.encoder.layer.{}.attention.self.", ("query", "key", "value")),
    "opt": ("model.decoder.layers.{}.self_attn.", ("q_proj", "k_proj", "v_proj")),
}
SEPARATE = ("llama", "qwen3", "gemma", "gemma2", "bert", "opt")
SIZE = {"qwen3": 16, "gemma": 16, "gemma2": 16}


def split(model: str, fused: Matrix, head: int) -> list[Matrix]:
    """Queries, keys and values [head_dim, width] of a head, of four, in a fused [out, width]."""
    if model in ("bloom", "falcon-rw"):
        return list(fused.reshape(4, 3, 8, 32)[head])
    if model == "falcon-new":
        group = fused.reshape(2, 4, 8, 32)[head // 2]
        return [group[head % 2], group[2], group[3]]
    if model in ("gpt2", "mpt"):
        return list(fused.reshape(3, 4, 8, 32)[:, head])
    if model == "falcon":
        return [fused[band(8, head)], fused[32:40], fused[40:48]]
    assert model == "phi3"
    return [fused[band(8, head)], fused[32:48][band(8, head // 2)], fused[48:][band(8, head // 2)]]


def circuits(model: str, folder: Path, layer: int, head: int) -> dict[str, Matrix]:
    """W_Q, W_K, W_V [width, head_dim] and W_O [head_dim, width] of a head, in row vectors."""
    size = SIZE.get(model, 8)
    default = "model.layers.{}.self_attn.o_proj"
    output = stored(folder, f"{OUTPUT.get(model, default).format(layer)}.weight")
    if model in SEPARATE:
        prefix, names = APART.get(
            model, ("model.layers.{}.self_attn.", ("q_proj", "k_proj", "v_proj"))
        )
        shared = 1 if model in APART else 2
        parts = [
            stored(folder, f"{prefix.format(layer)}{name}.weight")[
                band(size, head if part == 0 else head // shared)
            ]
            for part, name in enumerate(names)
        ]
    else:
        fused = stored(folder, f"{FUSED[model].format(layer)}.weight")
        parts = split(model, fused.T if model == "gpt2" else fused, head)
    read = output if model == "gpt2" else output.T
    matrices = (*(part.T for part in parts), read[band(size, head)])
    return dict(zip("qkvo", (matrix.astype(float) for matrix in matrices), strict=True))


def scaled(w: Matrix, components: list[int], factor: float) -> Matrix:
    u, s, vt = np.linalg.svd(w)
    s[components] *= factor
    return np.asarray((u * s) @ vt)


@pytest.mark.parametrize("family", sorted({*FUSED, *SEPARATE}))
@pytest.mark.parametrize("factor", [0.0, -2.0])
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


@pytest.mark.parametrize("family", ["gpt2", "bert", "bloom", "falcon-rw", "mpt", "opt"])
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


NORM = {
    "gpt2": "transformer.h.0.ln_1",
    "bloom": "transformer.h.0.input_layernorm",
    "falcon-new": "transformer.h.0.ln_attn",
    "mpt": "transformer.blocks.0.norm_1",
    "opt": "model.decoder.layers.0.self_attn_layer_norm",
}
"""A LayerNorm before attention; the others have an RMSNorm, Gemma's with weights less one."""


@pytest.mark.parametrize("family", [*NORM, "llama", "qwen3", "gemma", "gemma2", "phi3"])
def test_a_folded_norm_gives_the_components_of_what_is_read_after_it(
    family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of(family)
    edit = {"op": "head_spectrum", "heads": ["L0H1"], "components": [0], "factor": 0.0}
    output = apply_edits(tmp_path, base, [{**edit, "fold_norm": True}])
    before, after = (circuits(family, folder, 0, 1) for folder in (base, output))
    name = NORM.get(family, "model.layers.0.input_layernorm")
    weight = stored(base, f"{name}.weight").astype(float) + family.startswith("gemma")
    read = weight[:, None] * before["v"]
    if family in NORM:
        read = read - read.mean(axis=0)
    expected = scaled(read @ before["o"], [0], 0.0)
    assert np.abs(read @ after["o"] - expected).max() < 1e-6
    plain = scaled(before["v"] @ before["o"], [0], 0.0)
    assert np.abs(before["v"] @ after["o"] - plain).max() > 1e-3, "another component"


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "rotary": ("llama", {"circuit": "qk"}, "turns queries and keys by their positions"),
    "partly rotary": ("gpt_neox", {"circuit": "qk"}, "turns queries and keys"),
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


def test_bounded_queries_are_refused_but_not_what_a_head_writes(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    edit = {"op": "head_spectrum", "heads": ["L0H0"], "components": [0]}
    base = base_of("mpt", attn_config={"clip_qkv": 8.0})
    said = r"this mpt, which bounds queries and keys \(config.json: attn_config.clip_qkv\)"
    with pytest.raises(InputError, match=said):
        plan_of(tmp_path, base, [{**edit, "circuit": "qk"}])
    assert plan_of(tmp_path, base, [edit]).steps
    unbounded = base_of("mpt", attn_config={"clip_qkv": None})
    assert plan_of(tmp_path, unbounded, [{**edit, "circuit": "qk"}]).steps


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_no_component_is_refused(
    why: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    family, fields, said = REFUSED[why]
    edit = {"op": "head_spectrum", "heads": ["L0H0"], "components": [0], **fields}
    with pytest.raises(InputError, match=said):
        plan_of(tmp_path, base_of(family), [edit])
