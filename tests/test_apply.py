"""What `apply` writes beside the weights, and what its receipt says."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes import (
    HEADS,
    NEURONS,
    apply_edits,
    make_sae,
    sae_edit,
    snapshot,
    stored,
    weight_files,
    write_recipe,
)

from surgery import api
from surgery.apply import apply
from surgery.checkpoint import RECEIPT, SINGLE, Checkpoint
from surgery.checkpoint.files import sha256_file
from surgery.checkpoint.receipt import EDIT_PREDICATE, open_receipt, subjects
from surgery.errors import CheckpointError, OutputError
from surgery.plan import plan
from surgery.verify import verify


@pytest.fixture
def base(base_of: Callable[..., Path], tmp_path: Path) -> Path:
    """A base with side files, other formats and a hidden folder."""
    folder = tmp_path / "my model"
    shutil.copytree(base_of("llama", "bfloat16"), folder)
    for name in ("vocab.txt", "sub/x.json", "pytorch_model.bin", "onnx/model.onnx", ".git/HEAD"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_side_files_are_copied_and_other_weights_are_not(base: Path, tmp_path: Path) -> None:
    output = apply_edits(tmp_path, base, [HEADS])
    files = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()}
    assert files == {
        SINGLE, RECEIPT, "README.md", "config.json", "generation_config.json", "vocab.txt",
        "sub/x.json",
    }  # fmt: skip
    assert (output / "sub" / "x.json").read_text() == "sub/x.json"
    receipt = open_receipt(output / RECEIPT, EDIT_PREDICATE)
    assert receipt["predicate"]["not_carried"] == [
        "onnx/model.onnx",
        "pytorch_model.bin",
        ".git/",
    ]


def test_the_receipt_says_what_was_done(base: Path, tmp_path: Path) -> None:
    make_sae(tmp_path / "sae", "blocks.1.hook_mlp_out", 32)
    edits = [{**HEADS, "factor": 0.5}, NEURONS, sae_edit("steer_bias", (3,))]
    output = apply_edits(tmp_path, base, edits)
    receipt = open_receipt(output / RECEIPT, EDIT_PREDICATE)
    files = {p.relative_to(output).as_posix(): p for p in output.rglob("*") if p.is_file()}
    del files[RECEIPT]
    assert subjects(receipt, output) == {name: sha256_file(path) for name, path in files.items()}
    predicate, recipe = receipt["predicate"], tmp_path / "recipe.json"
    assert predicate["recipe"] == {"text": recipe.read_text(), "sha256": sha256_file(recipe)}
    assert predicate["base"]["name"] == "my model"
    for name, digest in predicate["base"]["files"].items():
        assert digest == sha256_file(base / name), name
    assert {SINGLE, "config.json", "vocab.txt"} <= set(predicate["base"]["files"])
    assert predicate["inputs"] == {
        f"sae/{name}": sha256_file(tmp_path / "sae" / name)
        for name in ("cfg.json", "sae_weights.safetensors")
    }
    assert predicate["config"] == {"mlp_bias": True}
    assert len(predicate["added"]) == 6


def test_each_edited_tensor_is_recorded(base: Path, tmp_path: Path) -> None:
    output = apply_edits(tmp_path, base, [{**HEADS, "factor": 0.5}, NEURONS])
    records = open_receipt(output / RECEIPT, EDIT_PREDICATE)["predicate"]["tensors"]
    assert len(records) == 4
    for record in records:
        before, after = (stored(folder, record["name"]) for folder in (base, output))
        assert record["before_sha256"] == hashlib.sha256(before.tobytes()).hexdigest()
        assert record["after_sha256"] == hashlib.sha256(after.tobytes()).hexdigest()
        change = after.astype(float) - before.astype(float)
        assert float(record["change"]["frobenius"]) == pytest.approx(np.linalg.norm(change))
        assert float(record["change"]["max_abs"]) == np.abs(change).max()
        assert int(record["change"]["elements"]) == np.count_nonzero(change)
        [edit] = record["edits"]
        inside = np.zeros(before.shape, bool)
        for start, stop in edit["regions"]:
            inside[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
        assert not change[~inside].any()
    assert [record["role"] for record in records] == [
        "o_proj.0.weight", "o_proj.1.weight", "down_proj.0.weight", "down_proj.1.weight"
    ]  # fmt: skip


def test_the_same_apply_twice_writes_the_same_bytes(base: Path, tmp_path: Path) -> None:
    """But for what the receipt says of inodes and times, which is of this machine."""
    recipe = write_recipe(tmp_path, [HEADS, NEURONS])
    one, two = (apply(recipe, base, tmp_path / name) for name in ("one", "two"))
    for path in sorted(one.output.iterdir()):
        if path.is_file() and path.name != RECEIPT:
            assert path.read_bytes() == (two.output / path.name).read_bytes()
    for done in (one, two):
        stats = done.receipt["predicate"].pop("stat")
        assert stats == {
            file: {
                "size": str((done.output / file).stat().st_size),
                "mtime_ns": str((done.output / file).stat().st_mtime_ns),
                "inode": str((done.output / file).stat().st_ino),
            }
            for file in stats
        }
    assert one.receipt == two.receipt


def many_shards(base_of: Callable[..., Path], folder: Path) -> Path:
    """A base of several shards of which an edit of one layer touches few."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base_of("llama"))
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def test_linked_shards_are_those_no_edit_touches(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = many_shards(base_of, tmp_path / "base")
    recipe = write_recipe(tmp_path, [HEADS])
    plain = apply(recipe, base, tmp_path / "plain")
    before = snapshot(base)
    done = apply(recipe, base, tmp_path / "linked", link=True)
    linked = done.receipt["predicate"]["linked"]
    touched = {plan(recipe, base).tensors[name].file for name in done.edited}
    assert set(linked) == {path.name for path in base.glob("*.safetensors")} - touched
    for path in done.output.glob("*.safetensors"):
        assert path.samefile(base / path.name) == (path.name in linked)
        assert path.read_bytes() == (plain.output / path.name).read_bytes()
    assert snapshot(base) == before
    assert verify(done.output, base).ok
    assert any("hard links" in note for note in done.notes)


def test_no_link_across_file_systems(
    base_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    base = many_shards(base_of, tmp_path / "base")
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with pytest.raises(OutputError, match="leave link out"):
        apply(write_recipe(tmp_path, [HEADS]), base, tmp_path / "out", link=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "recipe.json"]


def test_trusted_digests_are_those_of_files_as_the_receipt_left_them(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """A shard that was touched since is hashed; one that was not is taken at the receipt's word."""
    first = apply(
        write_recipe(tmp_path, [HEADS]), many_shards(base_of, tmp_path / "base"), tmp_path / "one"
    ).output
    shards = sorted(path.name for path in first.glob("*.safetensors"))
    touched, moved, forged, *untouched = shards
    os.utime(first / touched, ns=(1, 1))
    shutil.copy2(first / moved, first / "copy")
    (first / "copy").rename(first / moved)  # another inode, the same time and size
    facts = (first / forged).stat()
    raw = bytearray((first / forged).read_bytes())
    raw[-1] ^= 1
    (first / forged).write_bytes(raw)
    os.utime(first / forged, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    recipe = write_recipe(tmp_path, [NEURONS])
    honest = apply(recipe, first, tmp_path / "honest")
    done = apply(recipe, first, tmp_path / "two", trust_receipt=True)
    base = done.receipt["predicate"]["base"]
    assert base["trusted"] == [forged, *untouched]
    digests = {name: sha256_file(first / name) for name in shards}
    assert {name: base["files"][name] for name in shards if name != forged} == {
        name: digests[name] for name in shards if name != forged
    }
    assert base["files"][forged] != digests[forged]  # what trusting means
    for name in shards:
        assert (done.output / name).read_bytes() == (honest.output / name).read_bytes()
    assert not verify(done.output, first).ok
    assert verify(honest.output, first).ok


def test_nothing_is_trusted_without_a_receipt_or_with_a_broken_one(
    base: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, [HEADS])
    first = apply(recipe, base, tmp_path / "one", trust_receipt=True)
    assert first.receipt["predicate"]["base"]["trusted"] == []
    receipt = first.output / RECEIPT
    receipt.write_bytes(receipt.read_bytes().replace(b"o_proj", b"q_proj", 1))
    with pytest.raises(CheckpointError, match="self_sha256"):
        apply(recipe, first.output, tmp_path / "two", trust_receipt=True)
    assert not (tmp_path / "two").exists()


def test_an_edited_checkpoint_can_be_edited_again_and_names_its_parent(
    base: Path, tmp_path: Path
) -> None:
    first = apply_edits(tmp_path / "1", base, [HEADS])
    second = apply_edits(tmp_path / "2", first, [NEURONS])
    [parent] = open_receipt(second / RECEIPT, EDIT_PREDICATE)["predicate"]["parents"]
    assert parent["text"] == (first / RECEIPT).read_text()
    assert parent["sha256"] == sha256_file(first / RECEIPT)
    assert verify(second, first).findings == ()
    at_once = apply_edits(tmp_path / "3", base, [HEADS, NEURONS])
    assert (second / SINGLE).read_bytes() == (at_once / SINGLE).read_bytes()


def test_a_parent_receipt_that_is_no_text_is_bad_input(base: Path, tmp_path: Path) -> None:
    (base / RECEIPT).write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        apply_edits(tmp_path, base, [HEADS])
    assert not (tmp_path / "out").exists()


def test_progress_counts_the_bytes_of_the_shards_up_to_all_of_them(
    base: Path, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    recipe = write_recipe(tmp_path, [HEADS])
    apply(recipe, base, tmp_path / "out", progress=lambda name, n, of: told.append((name, n, of)))
    total = sum(map(len, weight_files(base).values()))
    assert [of for _, _, of in told] == [total] * len(told)
    assert [n for _, n, _ in told] == sorted({n for _, n, _ in told})
    assert told[-1] == (SINGLE, total, total)


def test_config_keeps_what_the_recipe_does_not_change(base: Path, tmp_path: Path) -> None:
    make_sae(tmp_path / "sae", "blocks.0.hook_attn_out", 32)
    output = apply_edits(tmp_path, base, [sae_edit("steer_bias")])
    before, after = (json.loads((f / "config.json").read_text()) for f in (base, output))
    assert after == {**before, "attention_bias": True}
    zeros = [n for n in Checkpoint.open(output).tensors if n.endswith("v_proj.bias")]
    assert len(zeros) == 2
    assert not any(stored(output, name).any() for name in zeros)


def test_a_base_truncated_after_planning_leaves_nothing(base: Path, tmp_path: Path) -> None:
    from surgery.apply import apply_plan
    from surgery.plan import plan

    found = plan(write_recipe(tmp_path / "r", [HEADS]), base)
    with (base / SINGLE).open("r+b") as file:
        file.truncate(found.base.info(found.edited[0]).begin + 1)
    with pytest.raises(CheckpointError, match="truncated"):
        apply_plan(found, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my model", "r"]


def test_a_config_that_names_code_is_carried_along_when_asked_for_and_never_run(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base, canary = tmp_path / "base", tmp_path / "canary"
    shutil.copytree(base_of("llama"), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.M"}}))
    (base / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    recipe, delta = write_recipe(tmp_path, [HEADS]), tmp_path / "delta.safetensors"
    edited, back = tmp_path / "edited", tmp_path / "back"
    calls: list[Callable[..., Any]] = [
        partial(api.inspect, base),
        partial(api.plan, recipe, base),
        partial(api.apply, recipe, base, edited, delta=delta),
        partial(api.apply, delta, base, tmp_path / "again"),
        partial(api.verify, edited, base=base),
        partial(api.diff_weights, base, edited),
        partial(api.revert, edited, delta, back),
    ]
    for call in calls:
        with pytest.raises(CheckpointError, match="allow-code"):
            call()
        call(allow_code=True)
    assert api.verify(edited, base=base, allow_code=True).ok
    assert snapshot(back).keys() == snapshot(base).keys()
    assert not canary.exists()
