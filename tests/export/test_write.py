"""An export appears whole, checked and sealed, or not at all; its parent never imports torch."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.checkpoint import EXPORT_RECEIPT
from surgery.checkpoint.receipt import EXPORT_PREDICATE, open_receipt, subjects
from surgery.errors import CheckpointError, ExportError, InputError, OutputError
from surgery.export import ExportResult, export, export_in_child, write
from surgery.process import Limits
from tests.models import Zoo, make


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_sealed_note_names_the_files_and_their_source(zoo: Zoo) -> None:
    folder = zoo.onnx("llama", "causal-lm").parent
    receipt = open_receipt(folder / EXPORT_RECEIPT, EXPORT_PREDICATE)
    named = subjects(receipt, folder)
    assert named == {name: sha256(folder / name) for name in ("model.onnx", "model.onnx.data")}
    assert {path.name for path in folder.iterdir()} == {*named, EXPORT_RECEIPT}
    facts = receipt["predicate"]
    assert (facts["task"], facts["opset"], facts["dtype"]) == ("causal-lm", 20, "float32")
    weights = sha256(zoo.checkpoint("llama") / "model.safetensors")
    assert facts["source"] == {"model.safetensors": weights}
    assert facts["versions"]["torch"]
    assert facts["unused"] == []


def test_occupied_outputs_and_the_models_own_folder_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.checkpoint("llama")
    (tmp_path / "kept.txt").write_text("mine")
    for target in (tmp_path, model, model / "onnx"):
        with pytest.raises(OutputError):
            export(model, target)
        with pytest.raises(OutputError):
            export_in_child(model, target)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert not (model / "onnx").exists()


def test_nothing_is_left_when_the_written_file_is_refused(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx_ir

    def save_garbage(model: object, path: Path) -> None:
        path.write_bytes(b"garbage")

    monkeypatch.setattr(write, "_save", save_garbage)
    empty = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[]), ir_version=10)
    with pytest.raises(InputError, match="not an ONNX file"):
        write.write(empty, tmp_path / "out", zoo.checkpoint("llama"), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"layout": "round"}, {"dtype": "int4"}, {"opset": 999}])
def test_unknown_options_are_bad_input(zoo: Zoo, tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(InputError, match=str(next(iter(options.values())))):
        export(zoo.checkpoint("llama"), tmp_path / "out", **options)  # type: ignore[arg-type]


def test_the_parent_of_a_child_export_imports_neither_torch_nor_onnx(
    zoo: Zoo, tmp_path: Path
) -> None:
    """The child's result is the same file that this process would have written."""
    code = (
        "import sys; from pathlib import Path; import surgery.runtimes.child\n"
        "from surgery.export import export_in_child\n"
        f"r = export_in_child(Path({str(zoo.checkpoint('bert'))!r}), Path('out'))\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules)\n"
        "print(sorted(heavy), r.model, r.task, r.bound)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[] out/model.onnx encoder 37\n", "")
    expected = zoo.onnx("bert", "encoder")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == expected.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_child_past_its_limit_leaves_nothing(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the export: timeout"):
        export_in_child(zoo.checkpoint("llama"), tmp_path / "out", limits=Limits(2.0))
    assert list(tmp_path.iterdir()) == []


def test_a_hostile_config_runs_no_code_and_is_bad_input(tmp_path: Path) -> None:
    model, canary = make("llama", tmp_path / "m"), tmp_path / "canary"
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    with pytest.raises(CheckpointError, match="auto_map"):
        export_in_child(model, tmp_path / "out")
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_a_result_survives_json() -> None:
    result = ExportResult(
        Path("o"), Path("o/m"), {"m": 1}, "encoder", 20, "float32", 3, ("a",), 0.5
    )
    assert ExportResult.from_json(json.loads(json.dumps(result.to_json()))) == result
