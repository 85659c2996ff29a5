"""Hundreds of faults planted in the weights of exports: each found, and named with its tensor."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from surgery.checkpoint import Checkpoint
from surgery.export import default_task, onnxfile
from surgery.export.lineage import Lineage, diagnosis, trace
from tests.export.weight_faults import FAULTS
from tests.models import Zoo, make

Array = NDArray[Any]
OURS = ("gpt2", "llama", "qwen3", "bert", "opt", "phi3")
THEIRS = ("gpt2", "llama", "bert", "opt")
CASES = [*(("surgery", family) for family in OURS), *(("torch", family) for family in THEIRS)]


@dataclass(frozen=True)
class Case:
    """An export with its weights inside, its checkpoint, the same family from another seed, and
    the clean lineage."""

    model: onnx.ModelProto
    source: Path
    other: Checkpoint
    clean: Lineage

    @property
    def tensor_of(self) -> dict[str, str]:
        """Initializers that are one whole tensor, as it is or transposed."""
        plain = ({}, {"transpose"})
        return {
            row.name: row.tensors[0]
            for row in self.clean.rows
            if row.status == "proven" and set(row.transform) - {"none"} in map(set, plain)
        }

    def initializer(self, model: onnx.ModelProto, name: str) -> Any:
        return next(t for t in model.graph.initializer if t.name == name)

    def is_turned(self, name: str) -> bool:
        (row,) = (row for row in self.clean.rows if row.name == name)
        return "transpose" in row.transform

    def weight(self, model: onnx.ModelProto, name: str) -> Array:
        """The initializer the way round that the checkpoint has it."""
        values = numpy_helper.to_array(self.initializer(model, name))
        return np.array(values.T if self.is_turned(name) else values)

    def put(self, model: onnx.ModelProto, name: str, values: Array) -> None:
        here = np.ascontiguousarray(values.T if self.is_turned(name) else values)
        self.initializer(model, name).CopyFrom(numpy_helper.from_array(here, name))

    def weights(self) -> list[str]:
        """A few initializers: of each shape, the first of the last layer that has it."""
        shapes: dict[tuple[tuple[int, ...], bool], str] = {}
        for name in self.tensor_of:
            shapes[self.weight(self.model, name).shape, self.is_turned(name)] = name
        return list(shapes.values())


def torch_export(source: Path, path: Path) -> Path:
    """PyTorch's own exporter with its optimiser, at fixed shapes: weights are folded, renamed and
    transposed, and the position table is cut to the length that was traced."""
    import torch
    import transformers

    encoder = "bert" in source.name
    kind = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    options: dict[str, Any] = {"add_pooling_layer": False} if encoder else {}
    loaded = kind.from_pretrained(source, **options).eval()

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = loaded

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            cache = {} if encoder else {"use_cache": False}
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **cache)[0]

    ids = torch.arange(14).reshape(2, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = ["logits"] if not encoder else ["last_hidden_state"]
        torch.onnx.export(
            Wrapper(), (ids, torch.ones_like(ids)), path, dynamo=True, optimize=True,
            external_data=False, output_names=names, verbose=False,
        )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def case(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Case]]:
    made: dict[tuple[str, str], Case] = {}
    root = tmp_path_factory.mktemp("faults")

    def build(exporter: str, family: str) -> Case:
        if (exporter, family) not in made:
            source = zoo.checkpoint(family)
            other = Checkpoint.open(make(family, root / f"{exporter}-{family}-other", seed=7))
            if exporter == "torch":
                path = torch_export(source, root / f"{family}.onnx")
            else:
                path = zoo.onnx(family, default_task(source).name)
            clean = trace(path, source)
            made[exporter, family] = Case(onnx.load(str(path)), source, other, clean)
        return made[exporter, family]

    yield build
    shutil.rmtree(root)


def quick(path: Path, source: Path) -> Lineage:
    """`trace` without `onnxfile.check`, which the clean file passed: it costs a child each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxfile, "check", lambda path, initializers: None)
        return trace(path, source)


def traced(case: Case, model: onnx.ModelProto, folder: Path) -> Lineage:
    path = folder / "planted.onnx"
    onnx.save(model, str(path))
    return quick(path, case.source)


def copy(model: onnx.ModelProto) -> onnx.ModelProto:
    planted = onnx.ModelProto()
    planted.CopyFrom(model)
    return planted


@pytest.mark.parametrize(("exporter", "family"), CASES)
def test_a_clean_export_has_no_finding(
    case: Callable[..., Case], exporter: str, family: str
) -> None:
    clean = case(exporter, family).clean
    assert clean.findings == ()
    assert clean.ok
    held, stored = clean.held(), Checkpoint.open(case(exporter, family).source).tensors
    assert {*held, *clean.unused} == set(stored)
    assert len(held) >= 15


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("exporter", "family"), CASES)
def test_a_planted_fault_is_found_and_named(
    case: Callable[..., Case], exporter: str, family: str, fault: str, tmp_path: Path
) -> None:
    export, planted = case(exporter, family), FAULTS[fault]
    for name in export.weights():
        tensor = export.tensor_of[name]
        values = export.weight(export.model, name)
        if planted.fits(values):
            model = copy(export.model)
            export.put(model, name, planted.plant(values, export.other.read(tensor)))
            (found,) = traced(export, model, tmp_path).findings
            expected = (planted.symptom, name, tensor)
            assert (found.symptom, found.initializer, found.tensor) == expected, found.message


@pytest.mark.parametrize(("exporter", "family"), CASES)
def test_swapped_and_doubled_weights_are_named(
    case: Callable[..., Case], exporter: str, family: str, tmp_path: Path
) -> None:
    export = case(exporter, family)
    for one, two in pairs(export):
        first, second = (export.weight(export.model, name) for name in (one, two))
        model = copy(export.model)
        export.put(model, one, second)
        doubled = traced(export, model, tmp_path)
        assert {(f.symptom, f.initializer, f.tensor) for f in doubled.findings} == {
            (diagnosis.WRONG, one, export.tensor_of[one])
        }
        export.put(model, two, first)
        swapped = traced(export, model, tmp_path)
        assert {(f.symptom, f.initializer, f.tensor) for f in swapped.findings} == {
            (diagnosis.SWAPPED, name, export.tensor_of[name]) for name in (one, two)
        }
        assert all(export.tensor_of[two] in f.message for f in swapped.findings[:1])


def pairs(export: Case) -> list[tuple[str, str]]:
    """Initializers of one shape, the same way round: a pair of each."""
    found: dict[Any, list[str]] = {}
    for name in export.tensor_of:
        key = export.weight(export.model, name).shape, export.is_turned(name)
        found.setdefault(key, []).append(name)
    return [(names[0], names[-1]) for names in found.values() if len(names) > 1]


@pytest.mark.parametrize("family", OURS)
@pytest.mark.parametrize("by", [1, -1])
def test_data_that_begins_one_element_off_is_shifted(
    zoo: Zoo, family: str, by: int, tmp_path: Path
) -> None:
    """The offset of the external data is moved, not the data."""
    source = zoo.checkpoint(family)
    clean = zoo.onnx(family, default_task(source).name)
    shutil.copytree(clean.parent, tmp_path / "copy")
    path = tmp_path / "copy" / clean.name
    last = {tuple(t.dims): t.name for t in external(onnx.load(str(path), load_external_data=False))}
    for name in last.values():
        model = onnx.load(str(path), load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.name == name)
        entry = next(e for e in tensor.external_data if e.key == "offset")
        size = path.with_name("model.onnx.data").stat().st_size
        moved, length = int(entry.value) + 4 * by, 4 * int(np.prod(tensor.dims))
        if 0 <= moved <= size - length:
            entry.value = str(moved)
            (path.parent / "moved.onnx").write_bytes(model.SerializeToString())
            (found,) = quick(path.parent / "moved.onnx", source).findings
            assert (found.symptom, found.initializer) == (diagnosis.SHIFTED, name)


def external(model: onnx.ModelProto) -> list[Any]:
    """Float weights that lie in external data."""
    weights = (t for t in model.graph.initializer if t.data_location == t.EXTERNAL)
    return [t for t in weights if t.data_type == onnx.TensorProto.FLOAT and t.name[-6:] == "weight"]
