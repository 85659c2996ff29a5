"""Initializers that are bytes of the checkpoint itself, in graphs made by hand and in exports."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from surgery.checkpoint import Checkpoint
from surgery.export import default_task
from surgery.export.lineage import Fault, Lineage, diagnosis, trace
from tests.export.weight_faults import quick
from tests.models import Zoo
from tests.onnx_files import model, save

LAYER = "model.layers.0"
Array = NDArray[Any]
FAMILIES = ("gpt2", "llama", "qwen3", "bert", "gpt_neox", "mixtral")

DTYPES = {"F32": TensorProto.FLOAT, "BF16": TensorProto.BFLOAT16}


def linked(source: Path, folder: Path, **moved: tuple[str, int]) -> Path:
    """A graph in a copy of the checkpoint whose initializers are its own bytes. `moved` takes a
    tensor's last name: the initializer begins so many bytes into another one."""
    shutil.copytree(source, folder)
    checkpoint = Checkpoint.open(folder)
    tensors = []
    for name, info in checkpoint.tensors.items():
        place, off = moved.get(name.split(".")[-2], (name, 0))
        tensor = TensorProto(name=name, data_type=DTYPES[info.dtype], dims=info.shape)
        tensor.data_location = TensorProto.EXTERNAL
        begin = checkpoint.info(place).begin + off
        for key, value in (("location", info.file), ("offset", begin), ("length", info.nbytes)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        tensors.append(tensor)
    node = helper.make_node("Gather", ["model.embed_tokens.weight", "input_ids"], ["logits"])
    proto = model([node], ["input_ids"], "logits", tensors)
    proto.graph.output[0].type.tensor_type.elem_type = tensors[0].data_type
    return save(proto, folder / "model.onnx")


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_bytes_of_the_checkpoint_itself_are_proven_by_their_place(
    zoo: Zoo, tmp_path: Path, stored: str
) -> None:
    path = linked(zoo.checkpoint("llama", stored), tmp_path / "model")
    found = trace(path, path.parent)
    assert found.ok
    assert {row.transform for row in found.rows} == {("none",)}
    assert [row.tensors for row in found.rows] == [(row.name,) for row in found.rows]
    # The same graph against another copy: other files, so that contents are compared.
    assert trace(path, zoo.checkpoint("llama", stored)).ok


def test_bytes_of_another_tensor_are_named(zoo: Zoo, tmp_path: Path) -> None:
    first, last = (f"model.layers.{n}.input_layernorm.weight" for n in (0, 1))
    path = linked(zoo.checkpoint("llama"), tmp_path / "model", norm=(first, 0))
    (fault,) = trace(path, path.parent).findings
    assert (fault.symptom, fault.initializer) == (diagnosis.WRONG, "model.norm.weight")
    assert fault.tensor == "model.norm.weight" and first in fault.message
    path = linked(zoo.checkpoint("llama"), tmp_path / "off", norm=(last, 4))
    (fault,) = trace(path, path.parent).findings
    assert (fault.symptom, fault.tensor) == (diagnosis.SHIFTED, "model.norm.weight")
    assert last in fault.message and "+4 bytes" in fault.message


def test_linked_bytes_of_another_type_or_shape_are_named(zoo: Zoo, tmp_path: Path) -> None:
    path = linked(zoo.checkpoint("llama"), tmp_path / "model")
    proto = onnx.load(str(path), load_external_data=False)
    up, norm = (
        next(t for t in proto.graph.initializer if t.name == name)
        for name in (f"{LAYER}.mlp.up_proj.weight", "model.norm.weight")
    )
    up.dims[:] = up.dims[::-1]
    norm.data_type = TensorProto.INT32
    found = trace(save(proto, path), path.parent)
    assert {f.initializer: f.symptom for f in found.findings} == {
        up.name: diagnosis.SHAPE,
        norm.name: diagnosis.DTYPE,
    }


# ------------------------------------------------------------------------------------- our exports


@dataclass(frozen=True)
class Ranges:
    """A linked export: its graph, and where each initializer lies."""

    path: Path
    model: onnx.ModelProto
    checkpoint: Checkpoint

    def initializer(self, name: str) -> Any:
        return next(t for t in self.model.graph.initializer if t.name == name)

    def weights(self) -> list[str]:
        """Initializers in the checkpoint's files: of each shape, the last that has it."""
        lying = [t for t in self.model.graph.initializer if t.data_location == t.EXTERNAL]
        return list({tuple(t.dims): t.name for t in lying}.values())

    def point(self, name: str, begin: int) -> None:
        (entry,) = (e for e in self.initializer(name).external_data if e.key == "offset")
        entry.value = str(begin)

    def other(self, name: str) -> str | None:
        """Another tensor of this one's shape, if there is one."""
        shape = self.checkpoint.info(name).shape
        tensors = self.checkpoint.tensors.values()
        return next((i.name for i in tensors if i.shape == shape and i.name != name), None)


def ranges(zoo: Zoo, family: str) -> Ranges:
    task = default_task(zoo.checkpoint(family)).name
    path = zoo.onnx(family, task, layout="linked")
    model = onnx.load(str(path), load_external_data=False)
    return Ranges(path, model, Checkpoint.open(path.parent))


def another(export: Ranges, name: str) -> str | None:
    other = export.other(name)
    if other is None:
        return None
    export.point(name, export.checkpoint.info(other).begin)
    return diagnosis.WRONG


def off(export: Ranges, name: str) -> str:
    info = export.checkpoint.info(name)
    last = max(i.end for i in export.checkpoint.tensors.values())
    export.point(name, info.begin + (4 if info.end < last else -4))
    return diagnosis.SHIFTED


def integers(export: Ranges, name: str) -> str:
    export.initializer(name).data_type = TensorProto.INT32
    return diagnosis.DTYPE


def flat(export: Ranges, name: str) -> str | None:
    dims = list(export.initializer(name).dims)
    export.initializer(name).dims[:] = [*dims[:-2], dims[-2] * dims[-1]] if dims[1:] else [1, *dims]
    return diagnosis.SHAPE


PLANTS = {"another": another, "one element off": off, "another type": integers, "flat": flat}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_linked_export_is_proven_without_reading_a_number(
    zoo: Zoo, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(stored: object, expression: object, checkpoint: object) -> bool:
        raise AssertionError("numbers were compared")

    export = ranges(zoo, family)
    monkeypatch.setattr(import_module("surgery.export.lineage.tracer"), "equals", read)
    found = quick(export.path, export.path.parent)
    assert found.ok
    assert {row.name: row.tensors[0] for row in found.rows if row.status == "proven"} == {
        name: name for name in found.held()
    }


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_range_of_a_linked_export_is_named(
    zoo: Zoo, family: str, plant: str, tmp_path: Path
) -> None:
    clean = ranges(zoo, family)
    folder = Path(shutil.copytree(clean.path.parent, tmp_path / "copy"))
    planted = 0
    for name in clean.weights():
        export = ranges(zoo, family)
        symptom = PLANTS[plant](export, name)
        if symptom is not None:
            path = save(export.model, folder / "model.onnx")
            named = [(f.symptom, f.initializer, f.tensor) for f in told(quick(path, path.parent))]
            assert named == [(symptom, name, name)]
            planted += 1
    assert planted >= 3


def told(found: Lineage) -> list[Fault]:
    """Findings of initializers; a tensor whose range another one took is missing besides."""
    return [fault for fault in found.findings if fault.initializer is not None]


DAMAGE = (diagnosis.ELEMENT, diagnosis.TRUNCATED, diagnosis.STALE)


@pytest.mark.parametrize("symptom", DAMAGE)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shard_that_is_not_the_checkpoint_s_is_compared(
    zoo: Zoo, family: str, symptom: str, tmp_path: Path
) -> None:
    """The graph points into a copy of the shard, in which one tensor is damaged."""
    export = ranges(zoo, family)
    folder = Path(shutil.copytree(export.path.parent, tmp_path / "copy"))
    for name in export.weights():
        info = export.checkpoint.info(name)
        values = export.checkpoint.read(name)
        with (folder / info.file).open("r+b") as shard:
            shard.seek(info.begin)
            shard.write(damaged(values, symptom).tobytes())
            shard.flush()
            found = told(quick(folder / "model.onnx", export.path.parent))
            shard.seek(info.begin)
            shard.write(values.tobytes())
        assert [(f.symptom, f.initializer, f.tensor) for f in found] == [(symptom, name, name)]


def damaged(values: Array, symptom: str) -> Array:
    flat = values.reshape(-1).copy()
    if symptom == diagnosis.ELEMENT:
        flat[len(flat) // 2] += 1
    elif symptom == diagnosis.TRUNCATED:
        flat[len(flat) // 2 :] = 0
    else:
        flat[:] = np.random.default_rng(len(flat)).standard_normal(len(flat))
    return flat.reshape(values.shape)
