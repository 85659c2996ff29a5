"""A folder we do not trust: only regular files inside it, only what its index really names."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipes import HEADS, apply_edits
from safetensors_files import tiled

from surgery.checkpoint import INDEX, SINGLE, Checkpoint
from surgery.checkpoint.files import resolve_inside
from surgery.errors import CheckpointError

A, B = "a-00001-of-00002.safetensors", "b-00002-of-00002.safetensors"


def sharded(folder: Path, weight_map: dict[str, Any] | None = None, total: Any = 12) -> Path:
    """Tensors `x` and `y` in two shards, with an index that may lie."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / A).write_bytes(tiled({"x": ("U8", (4,))}))
    (folder / B).write_bytes(tiled({"y": ("U8", (8,))}))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map or {"x": A, "y": B}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def single(folder: Path, config: Any = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    (folder / SINGLE).write_bytes(tiled({"x": ("U8", (4,))}))
    return folder


def refused(folder: Path) -> str:
    """What is said of a folder that cannot be opened, in one printable line."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_sharded_folder_opens(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path / "m"))
    assert {name: info.file for name, info in checkpoint.tensors.items()} == {"x": A, "y": B}
    assert checkpoint.read_bytes("y") == bytes(range(8))


@pytest.mark.parametrize(
    "shard",
    [
        "../b.safetensors", "/b.safetensors", "C:\\b.safetensors", "C:b.safetensors",
        "sub/b.safetensors", "sub\\b.safetensors", "..", ".b.safetensors", "b.bin", "",
        "b.safetensors\n", "b.safetensors\0", 7, None, ["b.safetensors"],
    ],
)  # fmt: skip
def test_the_index_names_only_shards_in_the_folder(shard: Any, tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(tiled({"y": ("U8", (8,))}))
    assert "'y' is in" in refused(sharded(tmp_path / "m", {"x": A, "y": shard}))


@pytest.mark.parametrize(
    ("weight_map", "total", "said"),
    [
        ({"x": A}, 4, "says 'y'|total_size"),
        ({"x": A, "y": B, "z": B}, 12, "says 'z'"),
        ({"x": B, "y": A}, 12, "says 'x'"),
        ({"x": A, "y": "c.safetensors"}, 12, "c.safetensors"),
        ({"x": A, "y": B}, 13, "total_size is '13'"),
        ({"x": A, "y": B}, "12", "total_size"),
        ([], 12, "weight_map|total_size"),
    ],
)
def test_the_index_says_what_the_shards_hold(
    weight_map: Any, total: Any, said: str, tmp_path: Path
) -> None:
    folder = sharded(tmp_path / "m")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    if weight_map == {"x": A}:
        # A shard the index does not name is not part of the model.
        assert list(Checkpoint.open(folder).tensors) == ["x"]
        assert B in Checkpoint.open(folder).not_carried
        return
    message = refused(folder)
    assert any(part in message for part in said.split("|"))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / B).unlink()
    assert B in refused(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / B).write_bytes(tiled({"y": ("U8", (8,)), "x": ("U8", (4,))}))
    assert "'x' is in" in refused(folder)


def test_an_index_beside_a_whole_file_is_ambiguous(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / SINGLE).write_bytes(tiled({"x": ("U8", (4,))}))
    assert "remove the stale one" in refused(folder)


def hub_snapshot(base: Path, cache: Path) -> Path:
    """`base` as the hub cache lays it out: links from a snapshot into blobs."""
    snapshot = cache / "models--a--b" / "snapshots" / "0123abc"
    blobs = cache / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(base.iterdir())):
        (blobs / f"{number:040x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_a_hub_snapshot_is_read_and_written_as_real_files(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    snapshot = hub_snapshot(base_of("gpt2"), tmp_path / "hub")
    output = apply_edits(tmp_path, snapshot, [HEADS])
    direct = apply_edits(tmp_path / "direct", base_of("gpt2"), [HEADS])
    assert not any(path.is_symlink() for path in output.iterdir())
    assert (output / SINGLE).read_bytes() == (direct / SINGLE).read_bytes()
    assert (output / SINGLE).stat().st_nlink == 1


@pytest.mark.parametrize("file", [SINGLE, "config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "where", ["..", "absolute", "loop", "fifo", "folder", "dangling", "device"]
)
def test_what_is_no_regular_file_of_the_folder_is_refused(
    file: str, where: str, tmp_path: Path
) -> None:
    folder = single(tmp_path / "m")
    path, outside = folder / file, tmp_path / "outside"
    outside.write_bytes((folder / SINGLE).read_bytes() if file == SINGLE else b"{}")
    path.unlink(missing_ok=True)
    targets = {
        "..": "../outside",
        "absolute": outside,
        "loop": path.name,
        "dangling": "nowhere",
        "device": "/dev/zero",
    }
    if where == "fifo":
        os.mkfifo(path)
    elif where == "folder":
        path.mkdir()
        (path / "x").write_bytes(b"")
    else:
        path.symlink_to(targets[where])
    if (where, file) == ("folder", "tokenizer.json"):
        assert Checkpoint.open(folder).side_files == ("config.json", "tokenizer.json/x")
        return
    refused(folder)


def test_the_blobs_of_another_layout_are_outside(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "x").write_bytes(b"")
    folder = single(tmp_path / "other" / "m")
    (folder / "side").symlink_to(tmp_path / "blobs" / "x")
    assert "is a link out of the folder" in refused(folder)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", os.fsdecode(b"\xff")])
def test_unprintable_file_names_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    folder = single(tmp_path / "m")
    (folder / name).write_bytes(b"")
    assert "not a printable file name" in refused(folder)


def test_a_bad_link_with_an_unprintable_name_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = single(tmp_path / "m")
    (folder / "a\nb").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError) as caught:
        resolve_inside(folder, "a\nb")
    assert str(caught.value).isprintable()


def test_a_file_truncated_while_it_is_read_is_an_error_not_a_crash(tmp_path: Path) -> None:
    folder = single(tmp_path / "m")
    checkpoint = Checkpoint.open(folder)
    with (folder / SINGLE).open("r+b") as file:
        file.truncate(checkpoint.info("x").begin + 1)
    with pytest.raises(CheckpointError, match="truncated at byte"):
        checkpoint.read("x")


class Canary:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickled_weights_are_never_loaded(name: str, tmp_path: Path) -> None:
    folder = single(tmp_path / "m")
    (folder / SINGLE).unlink()
    (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    assert "pickled weights" in refused(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"trust_remote_code": True},
        {"_attn_implementation_internal": "someone/kernel"},
        {"text_config": {"sub": [{"trust_remote_code": 1}]}},
        {"a": [{"b": {"auto_map": {"AutoConfig": "evil.Config"}}}]},
    ],
)
def test_a_config_that_names_code_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    folder = single(tmp_path / "m", config)
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    assert "names code to run" in refused(folder)
    assert Checkpoint.open(folder, allow_code=True).config == {**config}
    assert not canary.exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a":1,"a":1}', "\ufeff{}", "[" * 100_000, '"' + "x" * 99]
)
def test_a_malformed_config_is_refused(text: str, tmp_path: Path) -> None:
    folder = single(tmp_path / "m")
    (folder / "config.json").write_text(text)
    assert "config.json" in refused(folder)


def test_other_weights_and_receipts_are_not_carried(tmp_path: Path) -> None:
    folder = single(tmp_path / "m")
    left = ["pytorch_model.bin", "MODEL.PTH", "onnx/model.onnx", "other.safetensors", "x.gguf"]
    for name in [*left, "tokenizer.json", "vocab.txt"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.not_carried) == set(left)
    assert set(checkpoint.side_files) == {"config.json", "tokenizer.json", "vocab.txt"}


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    folder = single(tmp_path / "m")
    (folder / SINGLE).unlink()
    assert "has no model.safetensors" in refused(folder)
    assert "no such folder" in refused(tmp_path / "nowhere")
