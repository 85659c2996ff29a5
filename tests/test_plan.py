"""A plan says what will happen, refuses what has no meaning, and reads no weight."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipes import HEADS, NEURONS, apply_edits, make_sae, plan_of, sae_edit, write_recipe

from surgery.checkpoint import SINGLE, Checkpoint
from surgery.errors import CheckpointError, EditError, InputError, RecipeError
from surgery.plan import plan

EDITS = [HEADS, NEURONS, sae_edit("steer_bias")]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_no_weight_byte_is_read(
    family: str, base_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(family)
    make_sae(tmp_path / "sae", "blocks.0.hook_mlp_out", 32)
    start = 8 + int.from_bytes((base / SINGLE).read_bytes()[:8], "little")
    ends = record_reads(monkeypatch, base / SINGLE)
    found = plan_of(tmp_path, base, EDITS)
    assert found.steps
    assert ends
    assert max(ends) <= start
    assert found.base.read_bytes(found.edited[0])
    assert max(ends) > start, "the watch sees weights being read"


def record_reads(monkeypatch: pytest.MonkeyPatch, path: Path) -> list[int]:
    """Where every positioned read of `path` from now on ends; plain reads of it fail."""
    ends: list[int] = []
    inode = path.stat().st_ino
    pread, preadv, read = os.pread, os.preadv, os.read

    def watch(descriptor: int, count: int, offset: int) -> None:
        if os.fstat(descriptor).st_ino == inode:
            ends.append(offset + count)

    def watched_pread(descriptor: int, count: int, offset: int) -> bytes:
        watch(descriptor, count, offset)
        return pread(descriptor, count, offset)

    def watched_preadv(descriptor: int, buffers: Any, offset: int) -> int:
        watch(descriptor, sum(len(buffer) for buffer in buffers), offset)
        return preadv(descriptor, buffers, offset)

    def no_read(descriptor: int, count: int) -> bytes:
        assert os.fstat(descriptor).st_ino != inode
        return read(descriptor, count)

    monkeypatch.setattr(os, "pread", watched_pread)
    monkeypatch.setattr(os, "preadv", watched_preadv)
    monkeypatch.setattr(os, "read", no_read)
    return ends


def test_a_terabyte_of_weights_is_planned_at_once(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """The embedding claims 2**33 rows in a sparse file: nothing that read it would return."""
    base = tmp_path / "base"
    shutil.copytree(base_of("llama"), base)
    data = (base / SINGLE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, position = json.loads(data[8 : 8 + size]), 0
    config = json.loads((base / "config.json").read_text())
    for entry in (entry for name, entry in header.items() if name != "__metadata__"):
        if entry["shape"][0] == config["vocab_size"]:
            entry["shape"][0] = 2**30
        length = 4 * entry["shape"][0] * (entry["shape"][1] if len(entry["shape"]) > 1 else 1)
        entry["data_offsets"] = [position, position + length]
        position += length
    raw = json.dumps(header).encode()
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 2**30}))
    with (base / SINGLE).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + position)
    found = plan_of(tmp_path, base, [HEADS])
    assert found.disk_bytes == (base / SINGLE).stat().st_size > 2**37
    assert found.peak_bytes < 2**20


def test_a_plan_counts_what_apply_writes(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of("gpt2")
    make_sae(tmp_path / "sae", "blocks.1.hook_resid_post", 32)
    edits = [HEADS, sae_edit("orthogonalize")]
    found = plan_of(tmp_path, base, edits, untie=True)
    output = apply_edits(tmp_path, base, edits, untie=True)
    assert found.disk_bytes == (output / SINGLE).stat().st_size
    assert [tensor.name for tensor in found.added] == ["lm_head.weight"]
    assert found.config == {"tie_word_embeddings": False}
    assert set(found.edited) <= set(Checkpoint.open(output).tensors)
    assert set(found.inputs) == {"sae/cfg.json", "sae/sae_weights.safetensors"}


@pytest.mark.parametrize(
    ("family", "edit", "said"),
    [
        ("gpt2", {"op": "heads", "heads": ["L2H0"]}, "L2H0: layer 2 .* layers 0 to 1"),
        ("gpt2", {"op": "heads", "heads": ["L1H4"]}, "L1H4: head 4 .* heads 0 to 3"),
        ("llama", {"op": "heads", "heads": ["L1H4"]}, "L1H4: head 4 .* heads 0 to 3"),
        ("llama", {"op": "neurons", "neurons": ["L9N0"]}, "L9N0: layer 9 .* layers 0 to 1"),
        ("llama", {"op": "neurons", "neurons": ["L0N48"]}, "L0N48: .* neurons 0 to 47"),
        ("gpt2", {"op": "neurons", "neurons": ["L0N128"]}, "L0N128: .* neurons 0 to 127"),
    ],
)
def test_an_address_out_of_range_names_the_range_and_the_edit(
    family: str, edit: dict[str, Any], said: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(EditError, match=rf"recipe.json: {said} .*@ edits\[1\]"):
        plan_of(tmp_path, base_of(family), [{"op": "heads", "heads": ["L0H0"]}, edit])


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "bert"])
def test_a_tie_is_not_broken_unasked(
    family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    make_sae(tmp_path / "sae", "blocks.1.hook_resid_post", 32)
    edit = sae_edit("orthogonalize", approximate=family == "bert")
    with pytest.raises(EditError, match="say untie: true"):
        plan_of(tmp_path, base_of(family), [edit])
    assert plan_of(tmp_path, base_of(family), [edit], untie=True).added


def test_untie_changes_nothing_where_no_edit_breaks_the_tie(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    found = plan_of(tmp_path, base_of("gpt2"), [HEADS], untie=True)
    assert (found.added, found.config) == ((), {})


def test_float8_tensors_are_copied_and_refused_as_targets(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(base_of("llama"), base)
    tensors = load_file(base / SINGLE)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, base / SINGLE)
    with pytest.raises(EditError, match=f"'{name}' is stored as F8_E4M3, which cannot"):
        plan_of(tmp_path, base, [HEADS])
    output = apply_edits(tmp_path, base, [{"op": "heads", "heads": ["L0H0"]}])
    assert Checkpoint.open(output).read_bytes(name) == Checkpoint.open(base).read_bytes(name)


OUTSIDE = {"parent": "../h.csv", "link": "link.csv", "deep": "sub/../../h.csv"}


@pytest.mark.parametrize("path", [*OUTSIDE, "absolute"])
def test_a_path_out_of_the_recipes_folder_needs_leave(
    path: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "recipe"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "h.csv").write_text("layer,head\n0,1\n")
    (folder / "link.csv").symlink_to("../h.csv")
    file = OUTSIDE.get(path, str(tmp_path / "h.csv"))
    recipe = write_recipe(folder, [{"op": "heads", "file": file}])
    with pytest.raises(RecipeError, match=r"leaves the recipe's folder; .*--allow-outside"):
        plan(recipe, base_of("gpt2"))
    assert plan(recipe, base_of("gpt2"), allow_outside=True).edited


@pytest.mark.parametrize("file", ["missing.csv", "fifo", "folder", "loop", "a\0b", "x" * 300])
def test_an_unreadable_input_is_refused_without_waiting(
    file: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError) as caught:
        plan_of(tmp_path, base_of("gpt2"), [{"op": "heads", "file": file}])
    assert isinstance(caught.value, RecipeError | CheckpointError)
    assert str(caught.value).isprintable()


def test_thousands_of_neurons_in_two_edits_are_compared_in_seconds(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of("gpt2", n_inner=8000)
    halves = [[f"L0N{n}" for n in range(start, 8000, 2)] for start in (0, 1)]
    edits = [{"op": "neurons", "neurons": half} for half in halves]
    assert len(plan_of(tmp_path, base, edits).steps) == 8000
    halves[1].append("L0N4000")
    with pytest.raises(RecipeError, match=r"both change .*\[4000:4001"):
        plan_of(tmp_path, base, [{"op": "neurons", "neurons": half} for half in halves])
