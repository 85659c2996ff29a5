"""A portable export appears whole, checked and sealed, or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from surgery import process
from surgery.checkpoint import EXPORT_RECEIPT, Checkpoint
from surgery.checkpoint.files import sha256_file
from surgery.checkpoint.receipt import EXPORT_PREDICATE, open_receipt, subjects
from surgery.errors import (
    CheckpointError,
    EnvironmentFault,
    ExportError,
    InputError,
    OnnxError,
    OutputError,
)
from surgery.export import OPSETS, export, write
from surgery.export.datafile import DataFile
from surgery.export.expressions import from_json
from surgery.export.lineage import trace
from surgery.process import Limits
from tests.batches import BATCHES
from tests.models import make

FILES = {"model.onnx", "model.onnx.data", "lineage.json"}
Base = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(base_of: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an exported llama whose head is tied to its embedding, in bfloat16."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export(base_of("llama-biased", "bfloat16"), folder)
    return folder


def test_the_sealed_note_names_the_files_and_their_source(base_of: Base, exported: Path) -> None:
    receipt = open_receipt(exported / EXPORT_RECEIPT, EXPORT_PREDICATE)
    named = subjects(receipt, exported)
    assert named == {name: sha256_file(exported / name) for name in FILES}
    assert {path.name for path in exported.iterdir()} == {*FILES, EXPORT_RECEIPT}
    facts = receipt["predicate"]
    assert (facts["task"], facts["opset"], facts["dtype"]) == ("causal-lm", 20, "float32")
    source = base_of("llama-biased", "bfloat16") / "model.safetensors"
    assert facts["source"] == {"model.safetensors": sha256_file(source)}
    assert facts["versions"]["torch"]
    assert facts["unused"] == []
    assert "quantized" not in facts


def test_every_number_is_what_the_lineage_makes_of_the_checkpoint(
    base_of: Base, exported: Path
) -> None:
    said = json.loads((exported / "lineage.json").read_text())
    checkpoint = Checkpoint.open(base_of("llama-biased", "bfloat16"))
    proto = onnx.load(exported / "model.onnx", load_external_data=False)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    assert {row["name"] for row in said["initializers"]} <= set(tensors)
    for row in said["initializers"]:
        expected = from_json(row["expression"]).read(checkpoint)
        np.testing.assert_array_equal(
            numpy_helper.to_array(tensors[row["name"]], str(exported)), expected
        )
    assert set(said["tensors"]) == set(checkpoint.tensors)


def test_the_graph_holds_standard_operators_and_no_weights(exported: Path) -> None:
    proto = onnx.load(exported / "model.onnx", load_external_data=False)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 20)]
    large = [t for t in proto.graph.initializer if np.prod(t.dims) > 256]
    assert large and all(tensor.data_location == tensor.EXTERNAL for tensor in large)
    names = {tensor.name for tensor in proto.graph.initializer}
    assert not names & {value.name for value in proto.graph.value_info}
    assert not proto.metadata_props


def test_the_same_bytes_come_out_again(base_of: Base, exported: Path, tmp_path: Path) -> None:
    again = export(base_of("llama-biased", "bfloat16"), tmp_path / "again")
    for name in FILES:
        assert (again.output / name).read_bytes() == (exported / name).read_bytes()


def test_what_is_told_of_an_export(base_of: Base, tmp_path: Path) -> None:
    stages: list[str] = []
    told: list[tuple[int, int]] = []
    result = export(
        base_of("llama-biased", "bfloat16"),
        tmp_path / "out",
        stage=stages.append,
        progress=lambda item, done, total: told.append((done, total)),
    )
    assert [stage for stage in stages if stage != "trace"] == [
        "load", "optimise", "bind", "write", "check",
    ]  # fmt: skip
    assert list(result.stages) == stages
    assert result.seconds == pytest.approx(sum(result.stages.values()))
    assert result.sizes == {p.name: p.stat().st_size for p in result.output.iterdir()}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    [total] = {total for _, total in told}
    weights = base_of("llama-biased", "bfloat16") / "model.safetensors"
    assert told[-1][0] == total == result.sizes["model.onnx.data"] + weights.stat().st_size
    assert json.loads(json.dumps(result.to_json()))["bound"] == result.bound


def test_occupied_outputs_and_the_models_own_folder_are_refused(
    base_of: Base, tmp_path: Path
) -> None:
    model = base_of("llama-biased", "bfloat16")
    (tmp_path / "kept.txt").write_text("mine")
    for target in (tmp_path, model, model / "onnx"):
        with pytest.raises(OutputError):
            export(model, target)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert not (model / "onnx").exists()


def damaged(place: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A fault of the writer's that only a check of what was written can find."""

    def truncate(patch: pytest.MonkeyPatch) -> None:
        whole = DataFile.write

        def short(self: DataFile, path: Path, *rest: Any) -> str:
            digest = whole(self, path, *rest)
            path.write_bytes(path.read_bytes()[:-1])
            return digest

        patch.setattr(DataFile, "write", short)

    def wrong_type(patch: pytest.MonkeyPatch) -> None:
        serialized = write.serialized

        def changed(model: Any) -> bytes:
            node = next(node for node in model.graph if node.op_type == "Cast")
            node.outputs[0].shape = None
            node.outputs[0].type = None
            node.outputs[0].replace_all_uses_with(model.graph.inputs[0])
            data: bytes = serialized(model)
            return data

        patch.setattr(write, "serialized", changed)

    return {"data": truncate, "graph": wrong_type}[place]


@pytest.mark.parametrize("place", ["data", "graph"])
def test_nothing_is_left_of_a_model_that_a_check_refuses(
    base_of: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    damaged(place)(monkeypatch)
    with pytest.raises(OnnxError):
        export(base_of("llama-biased", "bfloat16"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_before_anything_is_written(
    base_of: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil._ntuple_diskusage(10**9, 10**9 - 100, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    monkeypatch.delattr(DataFile, "write")
    with pytest.raises(EnvironmentFault, match=r"needs \d+ bytes, 100 are free"):
        export(base_of("llama-biased", "bfloat16"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_does_not_fit_float16_leaves_nothing(base_of: Base, tmp_path: Path) -> None:
    from tests.export.test_bind import rewritten

    def overflow(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"][0] = 1e6

    model = rewritten(base_of("llama-biased"), tmp_path / "m", overflow)
    with pytest.raises(OnnxError, match=r"'model\.norm\.weight' holds 1e\+06"):
        export(model, tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    "options",
    [{"layout": "round"}, {"dtype": "int4"}, {"opset": 17}, {"opset": 26}, {"quantize": "int3"}],
)
def test_unknown_options_are_bad_input(
    base_of: Base, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=str(next(iter(options.values())))):
        export(base_of("llama"), tmp_path / "out", **options)


def test_a_cached_graph_is_exported_without_torch(
    base_of: Base, exported: Path, tmp_path: Path
) -> None:
    """Neither torch, transformers nor onnxruntime is imported by the parent."""
    code = (
        "import sys; from pathlib import Path; from surgery.export import export\n"
        "result = export(Path(sys.argv[1]), Path('out'))\n"
        "heavy = {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)\n"
        "print(sorted(heavy), result.model, result.cached)\n"
    )
    model = base_of("llama-biased", "bfloat16")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(model)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("[] out/model.onnx True\n", "")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (exported / "model.onnx").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_child_past_its_limit_leaves_nothing(
    base_of: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ExportError, match=r"timeout: killed at the limit of 1 s"):
        export(base_of("llama"), tmp_path / "out", limits=Limits(1.0))
    assert not (tmp_path / "out").exists()


def test_a_hostile_config_runs_no_code_and_is_bad_input(tmp_path: Path) -> None:
    model, canary = make("llama", tmp_path / "m"), tmp_path / "canary"
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    with pytest.raises(CheckpointError, match="auto_map"):
        export(model, tmp_path / "out")
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def outputs(model: Path) -> list[Any]:
    session = onnxruntime.InferenceSession(model)
    names = {value.name for value in session.get_inputs()}
    feeds = ({n: a for n, a in batch.inputs().items() if n in names} for batch in BATCHES)
    return [session.run(None, feed)[0] for feed in feeds]


def test_float16_gives_what_float32_gives_but_for_its_rounding(
    base_of: Base, exported: Path, tmp_path: Path
) -> None:
    """Masks, angles and epsilons included: padded batches give numbers, and near ones."""
    result = export(base_of("llama-biased", "bfloat16"), tmp_path / "out", dtype="float16")
    pairs = zip(BATCHES, outputs(result.model), outputs(exported / "model.onnx"), strict=True)
    for batch, found, expected in pairs:
        assert found.dtype == np.float16
        real = batch.attention_mask == 1
        np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=1e-2)


@pytest.mark.parametrize("opset", [OPSETS.start, OPSETS.stop - 1])
def test_the_oldest_and_the_newest_opset_give_the_same_outputs(
    base_of: Base, exported: Path, tmp_path: Path, opset: int
) -> None:
    result = export(base_of("llama-biased", "bfloat16"), tmp_path / "out", opset=opset)
    proto = onnx.load(result.model, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    for found, expected in zip(
        outputs(result.model), outputs(exported / "model.onnx"), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_int8_weights_are_said_to_be_so_and_stay_near(
    base_of: Base, exported: Path, tmp_path: Path
) -> None:
    model = base_of("llama-biased", "bfloat16")
    result = export(model, tmp_path / "out", quantize="int8")
    receipt = open_receipt(result.output / EXPORT_RECEIPT, EXPORT_PREDICATE)
    assert receipt["predicate"]["quantized"] == "int8"
    said = json.loads((result.output / "lineage.json").read_text())["initializers"]
    eight = {row["name"] for row in said if "quantised" in row["transform"]}
    assert len({name for name in eight if name.endswith("_quantized")}) == 2 * 7 + 2
    assert subjects(receipt, result.output) == {n: sha256_file(result.output / n) for n in FILES}
    modes = {path.stat().st_mode for path in result.output.iterdir()}
    assert len(modes) == 1
    proto = onnx.load(result.model, load_external_data=False)
    kinds = {node.op_type for node in proto.graph.node}
    assert "MatMulInteger" in kinds and "Gemm" not in kinds
    weights = {t.name for t in proto.graph.initializer if t.name.endswith("_quantized")}
    assert len(weights) == 2 * 7 + 2
    float_size = (exported / "model.onnx.data").stat().st_size
    assert result.sizes["model.onnx.data"] < float_size / 2
    for found, expected in zip(
        outputs(result.model), outputs(exported / "model.onnx"), strict=True
    ):
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("options", [{"layout": "linked"}, {"dtype": "float16"}])
def test_only_portable_float32_models_are_quantized(
    base_of: Base, tmp_path: Path, options: dict[str, str]
) -> None:
    with pytest.raises(InputError, match="cannot be quantized"):
        export(base_of("llama"), tmp_path / "out", quantize="int8", **options)  # type: ignore[arg-type]


def test_a_quantisation_that_fails_leaves_nothing(
    base_of: Base, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = process.run

    def fail(module: str, arguments: dict[str, Any], *rest: Any) -> process.Ending:
        if arguments["action"] == "quantize":
            return process.Ending("crash", "killed by SIGSEGV", 0.1, 1)
        return run(module, arguments, *rest)

    monkeypatch.setattr(process, "run", fail)
    with pytest.raises(ExportError, match="the quantisation: crash: killed by SIGSEGV"):
        export(base_of("llama-biased", "bfloat16"), tmp_path / "out", quantize="int8")
    assert list(tmp_path.iterdir()) == []


def test_every_initializer_is_found_again_in_the_checkpoint(base_of: Base, exported: Path) -> None:
    found = trace(exported / "model.onnx", base_of("llama-biased", "bfloat16"))
    assert found.ok
    said = json.loads((exported / "lineage.json").read_text())["initializers"]
    proven = {row.name for row in found.rows if row.status == "proven"}
    assert proven == {row["name"] for row in said}
