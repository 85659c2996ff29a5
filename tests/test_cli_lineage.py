"""`surgery lineage`: exit codes, table and JSON, on graphs that hold a whole checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper
from onnx_files import model, save

import surgery
from surgery.checkpoint import Checkpoint

NAME = "model.layers.1.mlp.down_proj.weight"


def whole(source: Path, path: Path, name: str = "", scale: float = 1.0) -> Path:
    """Every tensor of a checkpoint as an initializer, one of them scaled."""
    checkpoint = Checkpoint.open(source)
    tensors = []
    for tensor in checkpoint.tensors:
        values = checkpoint.read(tensor)
        scaled = values * np.float32(scale) if tensor == name else values
        tensors.append(numpy_helper.from_array(scaled, tensor))
    node = helper.make_node("Gather", ["model.embed_tokens.weight", "input_ids"], ["logits"])
    return save(model([node], ["input_ids"], "logits", tensors), path)


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "surgery", "lineage", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_whole_checkpoint_exits_0(base_of: Callable[..., Path], tmp_path: Path) -> None:
    source = base_of("llama")
    path = whole(source, tmp_path / "m.onnx")
    done = call("--model", source, "--onnx", path)
    assert (done.returncode, done.stderr) == (0, "")
    head, *rows, summary = done.stdout.splitlines()
    assert head.split() == ["initializer", "status", "tensor", "transform"]
    assert len(rows) == 21 and all("proven" in row for row in rows)
    assert summary == "m.onnx: ok, 21 initializers: 21 proven"


def test_a_mismatch_exits_1_and_is_named(base_of: Callable[..., Path], tmp_path: Path) -> None:
    source = base_of("llama")
    path = whole(source, tmp_path / "m.onnx", NAME, 1.002)
    done = call("--model", source, "--onnx", path, "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    (finding,) = found["findings"]
    assert (finding["symptom"], finding["initializer"], finding["tensor"]) == ("scaled", NAME, NAME)
    assert "about 1.002" in finding["message"]
    assert found["tensors"][NAME] == [NAME]
    assert surgery.lineage(source, path).to_json() == found
    done = call("--model", source, "--onnx", path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "m.onnx: FAILED, 21 initializers: 1 mismatch, 20 proven"


@pytest.mark.parametrize("bad", ["model", "onnx"])
def test_bad_input_exits_2_in_one_line(
    base_of: Callable[..., Path], tmp_path: Path, bad: str
) -> None:
    (tmp_path / "m.onnx").write_bytes(b"garbage")
    source = tmp_path / "nothing" if bad == "model" else base_of("llama")
    done = call("--model", source, "--onnx", tmp_path / "m.onnx")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("surgery: error: ") and done.stderr.count("\n") == 1


def test_names_cannot_reach_the_terminal(base_of: Callable[..., Path], tmp_path: Path) -> None:
    source = base_of("llama")
    checkpoint = Checkpoint.open(source)
    table = numpy_helper.from_array(checkpoint.read("model.embed_tokens.weight"), "a\x1b[31m\nb")
    node = helper.make_node("Gather", ["a\x1b[31m\nb", "input_ids"], ["logits"])
    path = save(model([node], ["input_ids"], "logits", [table]), tmp_path / "m.onnx")
    done = call("--model", source, "--onnx", path)
    assert done.returncode == 1  # the other tensors are missing
    assert "\x1b" not in done.stdout and "a\\x1b[31m\\nb" in done.stdout


def test_neither_torch_nor_onnxruntime_is_imported(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    path = whole(base_of("llama"), tmp_path / "m.onnx")
    code = (
        "import sys, surgery\n"
        f"surgery.lineage({str(base_of('llama'))!r}, {str(path)!r})\n"
        "print({'torch', 'onnxruntime', 'transformers'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
