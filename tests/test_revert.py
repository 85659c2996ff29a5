"""Deltas: the base again from its edit, the edit again from its base, every file to the byte."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES
from recipes import HEADS, NEURONS, make_sae, sae_edit, snapshot, write_recipe

from surgery import api
from surgery.checkpoint.delta import Delta
from surgery.checkpoint.header import read_header
from surgery.errors import CheckpointError, InputError, OutputError

EDITS: dict[str, list[dict[str, Any]]] = {
    "heads": [HEADS],
    "two of one tensor": [{**HEADS, "heads": ["L0H1"]}, {**HEADS, "heads": ["L0H2"]}],
    "orthogonalize, untied": [sae_edit("orthogonalize", approximate=True)],
    "steer_bias": [sae_edit("steer_bias")],
}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in snapshot(folder).items()}


def edit(folder: Path, base: Path, edits: list[dict[str, Any]]) -> tuple[Path, Path]:
    """Applies with a delta; the edited folder and the delta."""
    make_sae(folder / "sae", "blocks.1.hook_attn_out", 32)
    recipe = write_recipe(folder, edits, untie=True, allow_overlap=True)
    api.apply(recipe, base, folder / "edited", delta=folder / "delta.safetensors")
    return folder / "edited", folder / "delta.safetensors"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_revert_and_reapply_are_bit_identical(
    base_of: Callable[..., Path], tmp_path: Path, family: str, name: str, dtype: str
) -> None:
    base = base_of(family, dtype)
    approximate = family == "bert"
    edits = [
        {**e, "approximate": approximate} if "approximate" in e else dict(e) for e in EDITS[name]
    ]
    edited, delta = edit(tmp_path, base, edits)
    assert contents(edited) != contents(base)
    api.revert(edited, delta, tmp_path / "base")
    assert contents(tmp_path / "base") == contents(base)
    api.apply(delta, base, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(edited)


def test_a_sharded_base_with_a_card_and_a_receipt_comes_back(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    first, _ = edit(tmp_path / "one", base_of("llama", "bfloat16"), [HEADS])
    (first / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    second, delta = edit(tmp_path / "two", first, [NEURONS])
    assert "surgery-receipt.json" in contents(second)
    api.revert(second, delta, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(first)


def test_a_delta_holds_the_original_bytes_of_every_region(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    from recipes import stored

    base = base_of("llama")
    _, path = edit(tmp_path, base, [HEADS, NEURONS])
    delta = Delta.open(path)
    assert len(delta.record.regions) == 4
    for number, record in enumerate(delta.record.regions):
        original = stored(base, record.tensor)[record.region.slices]
        assert delta.region(number, "before").tobytes() == original.tobytes()
    with path.open("rb") as file:
        assert read_header(file.fileno(), "delta").tensors


def test_a_delta_of_another_checkpoint_is_refused_and_leaves_nothing(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    edited, delta = edit(tmp_path, base_of("gpt2"), [HEADS])
    before = snapshot(tmp_path)
    for call in (
        lambda: api.revert(base_of("gpt2"), delta, tmp_path / "out"),
        lambda: api.apply(delta, edited, tmp_path / "out"),
        lambda: api.apply(delta, base_of("llama"), tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match="another checkpoint"):
            call()
    assert snapshot(tmp_path) == before


def test_what_is_no_delta_or_no_new_file_is_refused(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of("gpt2")
    with pytest.raises(CheckpointError, match="not a delta"):
        api.apply(base / "model.safetensors", base, tmp_path / "out")
    recipe = write_recipe(tmp_path, [HEADS])
    for occupied in (recipe, base / "delta.safetensors", tmp_path / "no" / "delta"):
        with pytest.raises(OutputError):
            api.apply(recipe, base, tmp_path / "out", delta=occupied)
    with pytest.raises(InputError, match="a delta already"):
        api.apply(base / "model.safetensors", base, tmp_path / "out", delta=tmp_path / "d")
    assert not (tmp_path / "out").exists()


def test_a_failed_apply_leaves_no_delta(base_of: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, [{**HEADS, "factor": 1e38}])
    with pytest.raises(InputError, match="smaller factor"):
        api.apply(recipe, base_of("gpt2", "float16"), tmp_path / "o", delta=tmp_path / "d")
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.json"}


@given(st.data())
def test_a_flipped_bit_of_a_delta_never_gives_a_wrong_checkpoint(
    base_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    base = base_of("gpt2")
    edited, delta = edit(folder, base, [HEADS])
    raw = bytearray(delta.read_bytes())
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    delta.write_bytes(raw)
    try:
        api.revert(edited, delta, folder / "back")
    except InputError:
        assert not (folder / "back").exists()
    else:
        assert contents(folder / "back") == contents(base)
    shutil.rmtree(folder)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("band", [1 << 20, 512])
def test_the_factors_of_a_projection_are_its_change(
    base_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    band: int,
) -> None:
    """However many bands a matrix has, before + left @ right is what was rounded to after."""
    monkeypatch.setattr("surgery.editor.SLAB_BYTES", band)
    base = base_of(family)
    _, path = edit(tmp_path, base, [sae_edit("orthogonalize", features=[1])])
    delta = Delta.open(path)
    found = {}
    for number, record in enumerate(delta.record.regions):
        factors = delta.factors(number)
        if factors is None:
            continue
        before, after = delta.region(number, "before"), delta.region(number, "after")
        assert [values.shape[1 - side] for side, values in enumerate(factors)] == [1, 1]
        np.testing.assert_allclose(before + factors[0] @ factors[1], after, rtol=0, atol=1e-6)
        assert np.abs(after - before).max() > 1e-3
        found[record.tensor] = factors
    projected = [r.tensor for r in delta.record.regions if len(r.stop) == 2]
    assert list(found) == projected and len(projected) > 4


def test_what_is_not_low_rank_has_no_factors(base_of: Callable[..., Path], tmp_path: Path) -> None:
    """A region of scaled heads has none, nor a matrix that was projected and then scaled."""
    (tmp_path / "heads").mkdir()
    _, path = edit(tmp_path / "heads", base_of("llama"), [HEADS])
    assert Delta.open(path).factors(0) is None
    (tmp_path / "both").mkdir()
    _, path = edit(tmp_path / "both", base_of("llama"), [sae_edit("orthogonalize", [1]), HEADS])
    delta = Delta.open(path)
    scaled = [n for n, r in enumerate(delta.record.regions) if "o_proj" in r.tensor]
    assert len(scaled) == 4
    assert [delta.factors(n) for n in scaled] == [None] * 4


def test_a_stopped_run_is_ended_on_its_own_base_and_no_other(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """The output has its name, the delta waits for its own: the same command names it."""
    base, other = tmp_path / "base", tmp_path / "other"
    shutil.copytree(base_of("llama"), base)
    edited, delta = edit(tmp_path, base, [HEADS])
    whole = delta.read_bytes()
    waiting = delta.rename(delta.with_name(f".{delta.name}.staging"))
    shutil.copytree(base, other)
    raw = bytearray((other / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (other / "model.safetensors").write_bytes(raw)
    recipe = tmp_path / "recipe.json"
    with pytest.raises(OutputError, match="not empty"):
        api.apply(recipe, other, edited, delta=delta)
    assert waiting.read_bytes() == whole and not delta.exists()
    api.apply(recipe, base, edited, delta=delta)
    assert delta.read_bytes() == whole and not waiting.exists()
