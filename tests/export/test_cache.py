"""The cache of captured graphs: a hit needs no child and no torch, and damage is never a hit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_ir
import pytest

from surgery.export import cache, export, graphs
from surgery.export.graphs import Wanted, captured
from tests.here import in_this_process
from tests.models import Zoo, config_of, make
from tests.recipes import HEADS, apply_edits

KEY = "0" * 64
GRAPH = bytes(range(256))
FACTS = {"family": "bert", "layers": 2, "task": "encoder", "opset": 20, "dtype": "float32"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own: where its entries lie."""
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "graphs"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Wanted]:
    """What has been traced from here on; every graph is an empty one."""
    model = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[], name="g"), ir_version=10)
    data = onnx_ir.to_proto(model).SerializeToString()
    found: list[Wanted] = []

    def trace(wanted: Wanted, *rest: object) -> bytes:
        found.append(wanted)
        return bytes(data)

    monkeypatch.setattr(graphs, "_trace", trace)
    return found


def stages(wanted: Wanted) -> tuple[bool, list[str]]:
    """Whether the graph was cached, and the stages that were told."""
    told: list[str] = []
    return captured(wanted, stage=told.append)[1], told


def test_the_second_export_starts_no_child_and_imports_no_torch(zoo: Zoo, tmp_path: Path) -> None:
    zoo.onnx("bert", "encoder")
    model = shutil.copytree(zoo.checkpoint("bert"), tmp_path / "model")
    code = (
        "import subprocess, sys; from pathlib import Path\n"
        "def refuse(*a, **k): raise AssertionError('a child')\n"
        "subprocess.Popen = refuse\n"
        "from surgery.export import export\n"
        "r = export(Path('model'), layout='linked')\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'onnxscript'} & set(sys.modules)\n"
        "print(sorted(heavy), r.cached, r.model)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[] True model/model.onnx\n", "")
    assert (model / "model.onnx").is_file()


def test_edited_weights_have_the_bases_graph(
    zoo: Zoo, tmp_path: Path, folder: Path, traced: list[Wanted]
) -> None:
    base = zoo.checkpoint("bert")
    edited = apply_edits(tmp_path, base, [HEADS])
    wanted = [Wanted(path, "encoder", 20, "float32") for path in (base, edited)]
    assert stages(wanted[0]) == (False, ["trace"])
    assert stages(wanted[1]) == (True, [])
    assert traced == wanted[:1]


def rewritten(model: Path, folder: Path, **fields: Any) -> Path:
    """A copy of `model` whose config has other fields."""
    shutil.copytree(model, folder)
    (folder / "config.json").write_text(json.dumps({**config_of(model), **fields}))
    return folder


def key_of(model: Path, task: str = "encoder", opset: int = 20, dtype: str = "float32") -> str:
    return Wanted(model, task, opset, dtype).key()


def test_the_key_follows_what_the_graph_follows(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.checkpoint("bert")
    keys = {
        key_of(model),
        key_of(model, task="sequence-classification"),
        key_of(model, opset=21),
        key_of(model, dtype="float16"),
        key_of(rewritten(model, tmp_path / "a", layer_norm_eps=1e-3)),
        key_of(rewritten(model, tmp_path / "b", new_field=1)),
    }
    for package in ("torch", "transformers", "onnxscript", "onnx_ir", "weight-surgery"):
        own = cache.versions((package,))
        assert own[package] != "not installed"
        with monkeypatch.context() as patch:
            usual = cache.versions
            patch.setattr(cache, "versions", lambda p, u=usual, n=package: {**u(p), n: "0"})
            keys.add(key_of(model))
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "FORMAT", 0)
        keys.add(key_of(model))
    assert len(keys) == 12


def test_the_key_follows_the_pooler_that_only_the_file_tells_of(tmp_path: Path) -> None:
    from transformers import BertForMaskedLM, BertModel

    without = BertForMaskedLM.from_pretrained(make("bert", tmp_path / "m"))
    BertModel(without.config).save_pretrained(tmp_path / "with")
    config = config_of(tmp_path / "m")
    for name in ("m", "with"):
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    assert key_of(tmp_path / "m") != key_of(tmp_path / "with")


def test_the_key_does_not_follow_names_and_numbers(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.checkpoint("bert")
    moved = rewritten(model, tmp_path / "m", _name_or_path="x", transformers_version="0")
    other = make("bert", tmp_path / "other", seed=1, dtype="bfloat16")
    assert key_of(model) == key_of(moved) == key_of(other)


def test_an_entry_comes_back_as_it_was_stored(folder: Path) -> None:
    assert cache.load(KEY) is None
    cache.store(KEY, FACTS, GRAPH)
    assert cache.load(KEY) == GRAPH
    assert cache.load("1" * 64) is None
    assert [path.name for path in folder.iterdir()] == [f"{KEY}.graph"]


def test_any_flipped_bit_and_any_missing_end_is_no_entry(folder: Path) -> None:
    """But for bits of what the entry says of itself: the graph is then the right one."""
    cache.store(KEY, FACTS, GRAPH)
    path = folder / f"{KEY}.graph"
    whole = path.read_bytes()
    head = whole.index(b"\n") + 1
    for at in range(len(whole)):
        for damaged in (flipped(whole, at), whole[:at]):
            path.write_bytes(damaged)
            found = cache.load(KEY)
            assert found is None or (found == GRAPH and at < head), at
    path.write_bytes(flipped(whole, head))
    assert cache.load(KEY) is None
    path.write_bytes(whole + b"x")
    assert cache.load(KEY) is None


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES: dict[str, Any] = {
    "flipped": lambda data: flipped(data, len(data) - 1),
    "truncated": lambda data: data[:-1],
    "empty": lambda data: b"",
    "not JSON": lambda data: b"graph\n" + data.partition(b"\n")[2],
    "no object": lambda data: b"[1]\n" + data.partition(b"\n")[2],
    "deep": lambda data: b"[" * 100_000 + b"\n" + data.partition(b"\n")[2],
    "no digest": lambda data: b"{}\n" + data.partition(b"\n")[2],
    "digest of another": lambda data: (
        json.dumps({**FACTS, "sha256": "0" * 64}).encode() + b"\n" + data.partition(b"\n")[2]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_traced_again_and_healed(
    zoo: Zoo, folder: Path, traced: list[Wanted], damage: str
) -> None:
    wanted = Wanted(zoo.checkpoint("bert"), "encoder", 20, "float32")
    assert stages(wanted) == (False, ["trace"])
    [path] = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    assert stages(wanted) == (False, ["trace"])
    assert path.read_bytes() == whole
    assert stages(wanted) == (True, [])


WRITER = """
import sys
from surgery.export import cache
for _ in range(300):
    cache.store("0" * 64, {}, sys.argv[1].encode() * 50_000)
"""


def test_two_writers_at_once_leave_the_graph_of_one(folder: Path) -> None:
    cache.store(KEY, {}, b"a" * 50_000)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name]) for name in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        seen.add(cache.load(KEY))
    assert [writer.wait() for writer in writers] == [0, 0]
    assert seen | {cache.load(KEY)} <= {b"a" * 50_000, b"b" * 50_000}
    assert [path.name for path in folder.iterdir()] == [f"{KEY}.graph"]


def test_a_cache_that_cannot_be_written_is_done_without(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file lies where the folder should: nobody, root included, can write there."""
    zoo.onnx("bert", "encoder")
    wanted = Wanted(zoo.checkpoint("bert"), "encoder", 20, "float32")
    graph = cache.load(wanted.key())
    assert graph is not None
    monkeypatch.setattr(graphs, "_trace", lambda *given: graph)
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "file"))
    with in_this_process():
        result = export(zoo.checkpoint("bert"), tmp_path / "out")
    assert not result.cached
    assert (tmp_path / "file").read_text() == "mine"
    assert cache.entries() == []
    assert cache.clear() == 0


def test_a_write_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    cache.store(KEY, FACTS, GRAPH)
    assert list(folder.iterdir()) == []


def test_entries_say_what_they_are_and_can_be_cleared(folder: Path) -> None:
    assert cache.entries() == []
    assert cache.clear() == 0
    for age, key in enumerate("abc"):
        cache.store(key, {**FACTS, "layers": age}, GRAPH)
        os.utime(folder / f"{key}.graph", (1000 - age, 1000 - age))
    (folder / "d.graph").write_bytes(b"garbage")
    (folder / "tmpabcdef").mkdir()
    (folder / "tmpabcdef" / "left").write_bytes(b"12345")
    found = cache.entries()
    assert [entry.path.stem for entry in found] == ["a", "b", "c"]
    assert [entry.facts for entry in found] == [{**FACTS, "layers": n} for n in range(3)]
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    assert [entry.size for entry in found] == [entry.path.stat().st_size for entry in found]
    assert cache.clear() == sum(sizes)
    assert not folder.exists()


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert cache.folder() == Path("/a/graphs")
    monkeypatch.delenv("SURGERY_CACHE")
    assert cache.folder() == Path("/b/surgery/graphs")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path("/c/.cache/surgery/graphs")
