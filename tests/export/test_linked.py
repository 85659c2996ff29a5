"""A linked export is a graph alone, of the checkpoint's own bytes: it reads and moves none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from surgery.checkpoint import EXPORT_RECEIPT, LINEAGE, RECEIPT, Checkpoint
from surgery.errors import OutputError
from surgery.export import CACHED, ExportResult, export
from surgery.runtimes import RUNTIMES, ModelRef
from surgery.verify import verify
from tests.batches import BATCHES
from tests.here import in_this_process
from tests.models import Zoo, config_of
from tests.recipes import HEADS, apply_edits, snapshot

FILES = {"model.onnx", LINEAGE, EXPORT_RECEIPT}
UNTIED = ("llama", "mixtral")


def copy_of(zoo: Zoo, folder: Path, family: str = "llama", stored: str = "float32") -> Path:
    return Path(shutil.copytree(zoo.checkpoint(family, stored), folder))


def link(model: Path, **options: Any) -> ExportResult:
    with in_this_process():
        return export(model, task=CACHED, layout="linked", **options)


@pytest.mark.parametrize("family", ["gpt2", *UNTIED])
def test_three_files_come_and_no_other_is_touched(zoo: Zoo, tmp_path: Path, family: str) -> None:
    model = copy_of(zoo, tmp_path / "m", family)
    before = snapshot(model)
    result = link(model)
    after = snapshot(model)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == FILES
    assert result.sizes == {name: len(after[name][0]) for name in FILES}
    assert (result.output, result.model) == (model, model / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", UNTIED)
def test_no_weight_is_read(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, stored: str
) -> None:
    def refuse(*given: object, **named: object) -> None:
        raise AssertionError(f"a weight is read: {given[1:]}")

    model = copy_of(zoo, tmp_path / "m", family, stored)
    for name in ("read", "read_bytes", "read_rows"):
        monkeypatch.setattr(Checkpoint, name, refuse)
    assert link(model).bound > 0


def ranges(model: Path) -> dict[str, tuple[str, int, int, list[int]]]:
    """Tensor to its shard, first byte, bytes and shape, from the shards' own headers."""
    found = {}
    for shard in model.glob("*.safetensors"):
        data = shard.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = (shard.name, 8 + size + first, last - first, entry["shape"])
    return found


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt2", *UNTIED])
def test_every_tensor_is_one_initializer_byte_for_byte(zoo: Zoo, family: str, stored: str) -> None:
    path = zoo.onnx(family, CACHED, stored=stored, layout="linked")
    proto = onnx.load(str(path), load_external_data=False)
    outside = [t for t in proto.graph.initializer if t.data_location == t.EXTERNAL]
    found = {}
    for tensor in outside:
        fields = {entry.key: entry.value for entry in tensor.external_data}
        assert set(fields) == {"location", "offset", "length"}
        place = (fields["location"], int(fields["offset"]), int(fields["length"]))
        found[tensor.name] = (*place, list(tensor.dims))
        assert tensor.data_type == {"float32": 1, "bfloat16": 16}[stored]
    assert found == ranges(path.parent)
    inside = [t for t in proto.graph.initializer if t.data_location != t.EXTERNAL]
    assert sum(len(t.raw_data) for t in inside) < 4096, "constants and rotary frequencies"


def test_a_sharded_checkpoint_is_linked_shard_by_shard(zoo: Zoo, tmp_path: Path) -> None:
    whole = zoo.checkpoint("llama")
    model = sharded(whole, tmp_path / "m")
    link(model)
    proto = onnx.load(str(model / "model.onnx"), load_external_data=False)
    named = {
        entry.value for t in proto.graph.initializer for entry in t.external_data
        if entry.key == "location"
    }  # fmt: skip
    assert named == {"a.safetensors", "b.safetensors"}
    one = run(ModelRef("onnxruntime", model / "model.onnx", CACHED))
    other = run(ModelRef("onnxruntime", zoo.onnx("llama", CACHED, layout="linked"), CACHED))
    np.testing.assert_array_equal(one, other)


def sharded(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"{'ab'[n % 2]}.safetensors" for n, name in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        own = {name: array for name, array in tensors.items() if weight_map[name] == shard}
        save_file(own, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def run(ref: ModelRef) -> Any:
    return RUNTIMES[ref.runtime](ref, 1).infer(BATCHES[2].inputs())["logits"]


def test_it_opens_by_its_path_and_by_its_bytes_with_the_folder_named(
    zoo: Zoo, tmp_path: Path
) -> None:
    path = zoo.onnx("llama", CACHED, layout="linked")
    elsewhere = Path(shutil.copy(path, tmp_path))
    beside = run(ModelRef("onnxruntime", path, CACHED))
    apart = run(ModelRef("onnxruntime", elsewhere, CACHED, initializers=path.parent))
    np.testing.assert_array_equal(beside, apart)


def edited_of(zoo: Zoo, folder: Path) -> Path:
    return apply_edits(folder, zoo.checkpoint("llama"), [HEADS])


def test_verify_accepts_it_and_sees_one_flipped_bit(zoo: Zoo, tmp_path: Path) -> None:
    edited = edited_of(zoo, tmp_path)
    link(edited)
    assert verify(edited, zoo.checkpoint("llama")).findings == ()
    for name in sorted(FILES):
        path = edited / name
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        assert [finding.site for finding in verify(edited).findings] in ([name], [RECEIPT]), name
        path.write_bytes(whole)
    assert verify(edited).ok
    (edited / "model.onnx").unlink()
    assert [finding.site for finding in verify(edited).findings] == ["model.onnx"]


def test_an_edit_of_a_linked_checkpoint_leaves_its_graph_behind_and_can_be_linked(
    zoo: Zoo, tmp_path: Path
) -> None:
    base = copy_of(zoo, tmp_path / "base")
    link(base)
    edited = apply_edits(tmp_path, base, [HEADS])
    assert not FILES & {path.name for path in edited.iterdir()}
    link(edited)
    assert (edited / "model.onnx").read_bytes() == (base / "model.onnx").read_bytes()


def refusal(model: Path, **options: Any) -> str:
    before = snapshot(model)
    with pytest.raises(OutputError) as caught:
        link(model, **options)
    assert snapshot(model) == before
    return str(caught.value)


def test_links_are_refused_before_the_graph_is(zoo: Zoo, tmp_path: Path) -> None:
    hard = copy_of(zoo, tmp_path / "hard")
    os.link(hard / "model.safetensors", tmp_path / "other")
    soft = copy_of(zoo, tmp_path / "soft")
    (soft / "model.safetensors").rename(soft / "blob")
    (soft / "model.safetensors").symlink_to("blob")
    for model in (hard, soft):
        said = refusal(model)
        assert f"{model / 'model.safetensors'}: is a link" in said
        assert "--layout portable" in said


@pytest.mark.parametrize("name", sorted(FILES))
def test_what_is_there_already_is_kept(zoo: Zoo, tmp_path: Path, name: str) -> None:
    model = copy_of(zoo, tmp_path / "m")
    (model / name).write_text("mine")
    assert f"{model / name}: is there already" in refusal(model)


def test_a_second_export_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    model = copy_of(zoo, tmp_path / "m")
    link(model)
    assert "is there already; remove it to export again" in refusal(model)


def test_another_output_is_refused_and_its_own_folder_is_not(zoo: Zoo, tmp_path: Path) -> None:
    model = copy_of(zoo, tmp_path / "m")
    said = refusal(model, output=tmp_path / "out")
    assert f"leave --output out, or name {model}" in said
    assert not (tmp_path / "out").exists()
    assert link(model, output=model).model.is_file()


def test_a_relative_folder_will_do_and_the_working_folder_stays(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(zoo, tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    link(Path("m"))
    assert Path.cwd() == tmp_path
    assert Path("m/model.onnx").is_file()


@pytest.mark.parametrize("moves", range(3))
def test_a_run_stopped_between_renames_is_seen_and_healed(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    edited = edited_of(zoo, tmp_path)
    before = set(snapshot(edited))
    original, done = Path.replace, []

    def stop(self: Path, target: Path) -> Path:
        if target.parent == edited:
            if len(done) == moves:
                raise KeyboardInterrupt
            done.append(target.name)
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            link(edited)
    assert set(snapshot(edited)) - before == set(done)
    assert verify(edited).ok is (moves == 0)
    # What a killed run leaves of its work.
    (edited / ".surgery-export-left").mkdir()
    (edited / ".surgery-export-left" / "model.onnx").write_text("half")
    link(edited)
    assert set(snapshot(edited)) - before == FILES
    assert verify(edited, zoo.checkpoint("llama")).ok


def test_a_tied_head_that_the_file_holds_otherwise_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    from surgery.errors import ExportError

    model = copy_of(zoo, tmp_path / "m")
    config = {**config_of(model), "tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"the config ties .* but they differ"):
        link(model)
    assert not FILES & {path.name for path in model.iterdir()}
