"""`sae`: what a basis spans, what a projection leaves, and what steering adds."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS
from oracles import load_model
from recipes import apply_edits, editor_of, make_sae, sae_edit, stored

from surgery.addresses import Region
from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.edits.autoencoders.hooks import Point, named_modules, parse
from surgery.edits.projection import along_rows, basis, project
from surgery.edits.sae_projection import RankOne


@given(seed=st.integers(0, 99), count=st.integers(1, 5), width=st.integers(5, 9))
def test_a_basis_is_orthonormal_and_spans_the_rows(seed: int, count: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, width)) * 10.0 ** rng.integers(-6, 6, size=(count, 1))
    q = basis(rows)
    assert q.shape == (width, count)
    assert np.allclose(q.T @ q, np.eye(count), atol=1e-12)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.allclose(unit @ q @ q.T, unit, atol=1e-9)


def test_dependent_rows_give_a_smaller_basis() -> None:
    rows = np.array([[1.0, 2, 0], [2, 4, 0], [0, 0, 1]])
    assert basis(rows).shape == (3, 2)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_full_projection_leaves_nothing_along_any_feature(axis: int) -> None:
    """Projecting one row after another would leave part of the earlier ones."""
    rng = np.random.default_rng(0)
    rows, slab = rng.normal(size=(3, 8)), rng.normal(size=(8, 8))
    q, whole = basis(rows), Region.whole("w", slab.shape)
    along = q.T @ slab if axis == 0 else None
    left = project(slab, q, 1.0, whole, along)
    assert np.abs(np.tensordot(rows, left, axes=(1, axis))).max() < 1e-12
    half = project(slab, q, 0.5, whole, along)
    assert np.allclose(half, (slab + left) / 2)


WRITERS = {
    "transformer.wte.weight": 1, "transformer.wpe.weight": 1,
    "transformer.h.0.attn.c_proj.weight": 1, "transformer.h.0.attn.c_proj.bias": 0,
    "transformer.h.0.mlp.c_proj.weight": 1, "transformer.h.0.mlp.c_proj.bias": 0,
    "transformer.h.1.attn.c_proj.weight": 1, "transformer.h.1.attn.c_proj.bias": 0,
    "transformer.h.1.mlp.c_proj.weight": 1, "transformer.h.1.mlp.c_proj.bias": 0,
}  # fmt: skip


@pytest.mark.parametrize("layers", [None, "all", [1], "0"])
def test_orthogonalize_edits_every_writer_of_its_layers(
    layers: str | list[int] | None, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    rows = make_sae(tmp_path / "sae", "blocks.0.hook_resid_post", 32)[[1, 4, 7]]
    edit = sae_edit("orthogonalize", layers=layers)
    editor = editor_of(tmp_path, base_of("gpt2"), [edit], untie=True)
    layer = {"0": "h.0", "[1]": "h.1"}.get(str(layers), "")
    assert set(editor.plan.edited) == {name for name in WRITERS if layer in name}
    output = apply_edits(tmp_path, base_of("gpt2"), [edit], untie=True)
    for name in editor.plan.edited:
        left = np.tensordot(rows, stored(output, name), axes=(1, WRITERS[name]))
        assert np.abs(left).max() < 1e-5, name


def test_centred_rows_lose_their_mean(base_of: Callable[..., Path], tmp_path: Path) -> None:
    rows = make_sae(tmp_path / "sae", "blocks.0.hook_mlp_out", 32)[[1]]
    output = apply_edits(tmp_path, base_of("gpt2"), [sae_edit("steer_bias", (1,), center=True)])
    name = "transformer.h.0.mlp.c_proj.bias"
    added = stored(output, name).astype(float) - stored(base_of("gpt2"), name)
    assert np.allclose(added, rows[0] - rows[0].mean(), atol=1e-6)


@pytest.mark.parametrize("head_first", [True, False])
def test_steering_sees_the_edits_before_it_and_not_those_after(
    head_first: bool, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Through a head that an earlier edit zeroed, nothing reaches the bias."""
    vector = make_sae(tmp_path / "sae", "blocks.0.attn.hook_z", 32)[2]
    edits = [{"op": "heads", "heads": ["L0H1"]}, sae_edit("steer_bias", (2,))]
    output = apply_edits(tmp_path, base_of("gpt2"), edits if head_first else edits[::-1])
    bias, weight = (f"transformer.h.0.attn.c_proj.{kind}" for kind in ("bias", "weight"))
    if head_first:
        vector[8:16] = 0
    added = stored(output, bias).astype(float) - stored(base_of("gpt2"), bias)
    assert np.allclose(added, vector @ stored(base_of("gpt2"), weight), atol=1e-6)


def test_a_reduction_over_rows_holds_one_band_and_not_all_of_them() -> None:
    """qᵀW of a matrix in a thousand bands takes the memory of a few."""
    width, columns = 1000, 10_000
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((width, 2)))[0]
    row = np.arange(columns, dtype=np.float32)

    class Reader:
        def rows(self, tensor: str) -> Iterator[tuple[slice, Any]]:
            return ((slice(i, i + 1), row[None] * np.float32(i)) for i in range(width))

    tracemalloc.start()
    found = along_rows("w", q, 0, Reader())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_allclose(found, np.outer(q.T @ np.arange(width), row), rtol=1e-9)
    assert peak < 20 * row.nbytes


@settings(max_examples=50)
@given(seed=st.integers(0, 99), rank=st.integers(1, 3), strength=st.floats(-3, 3))
def test_rank_one_maps_commute_with_cutting_and_transposing(
    seed: int, rank: int, strength: float
) -> None:
    """(I + γDEᵀ)W whichever way W lies and however it is cut into bands."""
    rng = np.random.default_rng(seed)
    d, e = rng.normal(size=(2, 6, rank))
    weight = rng.normal(size=(6, 4))
    edit = RankOne(e, strength, (0,), False, d)
    expected = (np.eye(6) + strength * d @ e.T) @ weight
    rows = [Region.band("w", (6, 4), 0, start, start + 2) for start in (0, 2, 4)]
    state = {"w": e.T @ weight}
    bands = [edit.transform(weight[band.slices], band, state) for band in rows]
    np.testing.assert_allclose(np.concatenate(bands), expected, atol=1e-12)
    whole = Region.whole("w", (4, 6))
    turned = edit.transform(weight.T, whole, {"w": None})
    np.testing.assert_allclose(turned.T, expected, atol=1e-12)
    left, right = edit.factors(weight.T, whole, {"w": None})
    np.testing.assert_allclose(weight.T + left @ right, turned, atol=1e-12)


def test_rank_one_adds_a_unit_decoder_row_for_each_unit_read_by_the_encoder(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    make_sae(tmp_path / "sae", "blocks.0.hook_mlp_out", 32)
    sae = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    edit = sae_edit("rank1", (2,), strength=0.5, layers=[0])
    output = apply_edits(tmp_path, base_of("gpt2"), [edit])
    name = "transformer.h.0.mlp.c_proj.weight"
    before = stored(base_of("gpt2"), name).astype(float)
    d = sae["W_dec"][2] / np.linalg.norm(sae["W_dec"][2])
    expected = before + 0.5 * np.outer(before @ sae["W_enc"][:, 2], d)
    np.testing.assert_allclose(stored(output, name), expected, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_a_module_path_is_the_point_where_its_output_is(
    model: str, base_of: Callable[..., Path]
) -> None:
    """The output of the module a path names is, on the live model, what the point stands for:
    the stream's change from one side of the sublayer to the other, or the stream itself."""
    import torch

    arch = identify(Checkpoint.open(base_of(model)))
    live = load_model(base_of(model))
    layer = 0 if model == "qwen3_moe" else 1  # whose layer 1 has experts in place of an MLP
    paths = {
        (template.format(layer=layer), side): site for template, side, site in named_modules(arch)
    }
    seen: dict[tuple[str, str], Any] = {}

    def keep(path: str, side: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            value = inputs[0] if side == "input" else output
            value = value[0] if isinstance(value, tuple) else value
            seen[path, side] = value.detach().clone()

        return hook

    streams: dict[str, Any] = {}
    block = arch.block(live, layer)
    with ExitStack() as stack:
        block.register_forward_pre_hook(
            lambda module, inputs: streams.__setitem__("pre", inputs[0].detach().clone())
        )
        block.register_forward_hook(
            lambda module, inputs, out: streams.__setitem__(
                "post", (out[0] if isinstance(out, tuple) else out).detach().clone()
            )
        )
        for path, side in paths:
            module = live.base_model.get_submodule(path)
            stack.enter_context(module.register_forward_hook(keep(path, side)))
        with torch.no_grad():
            live(input_ids=torch.arange(3, 10)[None])
    by_site: dict[str, list[Any]] = {}
    for (path, side), site in paths.items():
        assert parse(f"{path}.{side}", arch) == Point(layer, site)
        value = seen[path, side].reshape(streams["pre"].shape[:2] + (-1,))
        by_site.setdefault(site, []).append(value)
    for values in by_site.values():
        for value in values[1:]:
            torch.testing.assert_close(value, values[0])
    first = {site: values[0] for site, values in by_site.items()}
    added = [first[site] for site in ("hook_attn_out", "hook_mlp_out") if site in first]
    if len(added) == 2:
        expected = streams["pre"] + added[0] + added[1]
        torch.testing.assert_close(streams["post"], expected, rtol=1e-5, atol=1e-5)
    if "hook_resid_post" in first:
        torch.testing.assert_close(first["hook_resid_post"], streams["post"])
    if "hook_resid_mid" in first:
        torch.testing.assert_close(first["hook_resid_mid"], streams["pre"] + first["hook_attn_out"])
