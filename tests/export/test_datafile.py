"""The data file: whole pages, the order of use, hashed while it is written, in little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.files import sha256_file
from surgery.checkpoint.header import encode_header
from surgery.errors import OnnxError
from surgery.export.capture import placeholder
from surgery.export.datafile import ALIGNMENT, INLINE, DataFile, plan_data
from surgery.export.expressions import Cast, Expressions, Tensor, Transpose

Base = Callable[..., Path]
UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
BOUND: Expressions = {
    "norm": Tensor("model.norm.weight"),
    "up.T": Cast(Transpose(Tensor(UP)), "float16"),
    "down": Tensor(DOWN),
}


def graph(checkpoint: Checkpoint, constants: dict[str, Any]) -> Any:
    """Reads down before norm, and norm twice; up.T and the constants at the end."""
    values: dict[str, Any] = {}
    for name, expression in BOUND.items():
        kind = onnx_ir.DataType.from_numpy(expression.dtype(checkpoint))
        shape = onnx_ir.Shape(expression.shape(checkpoint))
        value = onnx_ir.Value(name=name, shape=shape, type=onnx_ir.TensorType(kind))
        value.const_value = placeholder(value)
        values[name] = value
    for name, array in constants.items():
        values[name] = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array, name=name))
    order = ("down", "norm", "norm", "up.T", *constants)
    nodes = [onnx_ir.node("Identity", [values[name]]) for name in order]
    return onnx_ir.Model(
        onnx_ir.Graph([], [], nodes=nodes, initializers=list(values.values())), ir_version=10
    )


@pytest.fixture
def checkpoint(base_of: Base) -> Checkpoint:
    return Checkpoint.open(base_of("llama"))


def written(plan: DataFile, checkpoint: Checkpoint, file: Path) -> tuple[bytes, str, list[int]]:
    told: list[int] = []
    digest = plan.write(file, checkpoint, told.append)
    return file.read_bytes(), digest, told


def test_every_tensor_lies_where_the_graph_says(checkpoint: Checkpoint, tmp_path: Path) -> None:
    constants = {"angles": np.arange(INLINE, dtype=np.float32), "axis": np.zeros(3, np.int64)}
    model = graph(checkpoint, constants)
    plan = plan_data(model, BOUND, "data")
    data, digest, told = written(plan, checkpoint, tmp_path / "data")
    assert list(plan.offsets) == ["down", "norm", "up.T", "angles"]
    assert len(data) == plan.size == sum(told)
    assert digest == sha256_file(tmp_path / "data")
    expected = {name: e.read(checkpoint) for name, e in BOUND.items()} | {
        "angles": constants["angles"]
    }
    for name, array in expected.items():
        tensor = model.graph.initializers[name].const_value
        assert (tensor.location, tensor.offset % ALIGNMENT) == ("data", 0)
        assert tensor.length == array.nbytes
        assert data[tensor.offset : tensor.offset + tensor.length] == array.tobytes()
    assert isinstance(model.graph.initializers["axis"].const_value, onnx_ir.Tensor)


def test_what_lies_between_tensors_is_zero(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = plan_data(graph(checkpoint, {}), BOUND, "data")
    data, _, _ = written(plan, checkpoint, tmp_path / "data")
    used = bytearray(len(data))
    for name, offset in plan.offsets.items():
        length = BOUND[name].read(checkpoint).nbytes
        used[offset : offset + length] = b"\1" * length
    assert not any(byte for byte, taken in zip(data, used, strict=True) if not taken)


def test_a_number_that_does_not_fit_stops_the_writing(base_of: Base, tmp_path: Path) -> None:
    from tests.export.test_bind import rewritten

    def overflow(tensors: dict[str, Any]) -> None:
        tensors[UP][5, 5] = 1e30

    checkpoint = Checkpoint.open(rewritten(base_of("llama"), tmp_path / "m", overflow))
    plan = plan_data(graph(checkpoint, {}), BOUND, "data")
    with pytest.raises(OnnxError, match="does not fit float16"):
        written(plan, checkpoint, tmp_path / "data")


def test_a_file_that_is_there_is_never_written_over(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"mine")
    plan = plan_data(graph(checkpoint, {}), BOUND, "data")
    with pytest.raises(FileExistsError):
        written(plan, checkpoint, tmp_path / "data")
    assert (tmp_path / "data").read_bytes() == b"mine"


def test_an_error_of_the_caller_ends_the_writing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def stop(nbytes: int) -> None:
        raise KeyboardInterrupt

    plan = plan_data(graph(checkpoint, {}), BOUND, "data")
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(KeyboardInterrupt):
        plan.write(tmp_path / "data", checkpoint, stop)
    assert set(Path("/proc/self/fd").iterdir()) <= before


@pytest.mark.parametrize("transposed", [False, True])
def test_memory_follows_the_band_and_not_the_model(tmp_path: Path, transposed: bool) -> None:
    """64 MiB in bfloat16 become 128 MiB; only a transposition reads all of its operand."""
    header = {"w": {"dtype": "BF16", "shape": [8192, 4096], "data_offsets": [0, 64 << 20]}}
    raw = encode_header(header)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + (64 << 20))
    expression = Cast(Transpose(Tensor("w")) if transposed else Tensor("w"), "float32")
    plan = DataFile({"w": expression}, {}, {"w": 0}, 128 << 20)
    tracemalloc.start()
    try:
        plan.write(tmp_path / "data", Checkpoint.open(tmp_path), lambda nbytes: None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "data").stat().st_size == 128 << 20
    assert peak < (48 << 20) + (64 << 20) * transposed
