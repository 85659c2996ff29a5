"""What ships is the file on disk: every parameter reads the checkpoint's own tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir
import pytest
from safetensors.numpy import save_file

from surgery.errors import ExportError, OnnxError
from surgery.export.bind import bind
from surgery.export.capture import ALIASES
from surgery.export.names import find_tensor

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


def checkpoint(folder: Path, tensors: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def graph(*names: str, dtype: type = np.float32, aliases: dict[str, Any] | None = None) -> Any:
    """A graph of [2, 3] parameters, captured with other numbers than the checkpoint's."""
    values = [
        onnx_ir.Value(
            name=name,
            shape=onnx_ir.Shape([2, 3]),
            type=onnx_ir.TensorType(onnx_ir.DataType.from_numpy(np.dtype(dtype))),
            const_value=onnx_ir.tensor(np.full((2, 3), 99, dtype), name=name),
        )
        for name in names
    ]
    model = onnx_ir.Model(
        onnx_ir.Graph([], [], nodes=[], initializers=values, name="g"), ir_version=10
    )
    model.meta[ALIASES] = aliases or {name: (name,) for name in names}
    return model


def bound_values(model: Any, name: str) -> Any:
    return model.graph.initializers[name].const_value.numpy()


@pytest.mark.parametrize(
    ("parameter", "stored"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("transformer.wte.weight", "wte.weight"),
        ("encoder.layer.0.weight", "bert.encoder.layer.0.weight"),
    ],
)
def test_a_parameter_gets_its_tensor_with_or_without_the_base_models_prefix(
    tmp_path: Path, parameter: str, stored: str
) -> None:
    model = graph(parameter)
    assert bind(model, checkpoint(tmp_path / "c", {stored: WEIGHT})) == {parameter: stored}
    np.testing.assert_array_equal(bound_values(model, parameter), WEIGHT)


def test_a_name_that_could_mean_two_tensors_means_none() -> None:
    assert find_tensor("x.weight", ["a.x.weight", "b.x.weight"]) is None
    assert find_tensor("x.weight", ["a.x.weight", "x.weight"]) == "x.weight"
    assert find_tensor("a.x.weight", ["b.x.weight"]) is None


def test_numbers_are_read_when_the_file_is_written_not_before(tmp_path: Path) -> None:
    model = graph("w.weight")
    folder = checkpoint(tmp_path / "c", {"w.weight": WEIGHT})
    bind(model, folder)
    checkpoint(folder, {"w.weight": WEIGHT + 1})
    np.testing.assert_array_equal(bound_values(model, "w.weight"), WEIGHT + 1)


def test_buffers_keep_their_captured_values(tmp_path: Path) -> None:
    model = graph("w.weight", "rotary.inv_freq", aliases={"w.weight": ("w.weight",)})
    bind(model, checkpoint(tmp_path / "c", {"w.weight": WEIGHT}))
    assert (bound_values(model, "rotary.inv_freq") == 99).all()


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_stored_dtypes_are_cast_to_the_compute_dtype(tmp_path: Path, stored: type) -> None:
    weight = (WEIGHT / 3).astype(stored)
    model = graph("w.weight")
    folder = tmp_path / "c"
    if stored is ml_dtypes.bfloat16:
        write_bfloat16(folder, weight)
    else:
        checkpoint(folder, {"w.weight": weight})
    bind(model, folder)
    np.testing.assert_array_equal(bound_values(model, "w.weight"), weight.astype(np.float32))


def write_bfloat16(folder: Path, weight: Any) -> None:
    checkpoint(folder, {"w.weight": weight.view(np.uint16)})
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"U16" ', b'"BF16"').replace(b'"U16"', b'"BF16"'))
    data = path.read_bytes()
    length = data.index(b"}}") + 2
    header = data[8:length].rstrip()
    path.write_bytes(len(header).to_bytes(8, "little") + header + weight.tobytes())


def test_a_parameter_without_a_tensor_or_of_another_shape_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no tensor for parameter 'w\.weight'"):
        bind(graph("w.weight"), checkpoint(tmp_path / "a", {"v.weight": WEIGHT}))
    with pytest.raises(ExportError, match=r"F32 \[3, 2\]; .* float tensor \[2, 3\]"):
        bind(graph("w.weight"), checkpoint(tmp_path / "b", {"w.weight": WEIGHT.T.copy()}))
    with pytest.raises(ExportError, match="is I32"):
        bind(graph("w.weight"), checkpoint(tmp_path / "c", {"w.weight": WEIGHT.astype("i4")}))


def test_tied_parameters_share_the_one_tensor_on_disk(tmp_path: Path) -> None:
    names = ("lm_head.weight", "model.embed.weight")
    aliases = dict.fromkeys(names, names)
    model = graph("lm_head.weight", aliases=aliases)
    folder = checkpoint(tmp_path / "a", {"model.embed.weight": WEIGHT})
    assert bind(model, folder) == {"lm_head.weight": "model.embed.weight"}
    same = dict.fromkeys(names, WEIGHT)
    bind(graph("lm_head.weight", aliases=aliases), checkpoint(tmp_path / "b", same))
    other = {**same, "lm_head.weight": WEIGHT + 1}
    with pytest.raises(ExportError, match="they differ"):
        bind(graph("lm_head.weight", aliases=aliases), checkpoint(tmp_path / "c", other))


def test_float16_refuses_what_it_cannot_hold_but_keeps_infinities(tmp_path: Path) -> None:
    wide = WEIGHT.copy()
    wide[1, 2] = -1e6
    folder = checkpoint(tmp_path / "a", {"w.weight": wide})
    with pytest.raises(OnnxError, match=r"'w\.weight' holds 1e\+06, which does not fit float16"):
        bind(graph("w.weight", dtype=np.float16), folder, "float16")
    infinite = WEIGHT.copy()
    infinite[0, 0] = np.inf
    model = graph("w.weight", dtype=np.float16)
    bind(model, checkpoint(tmp_path / "b", {"w.weight": infinite}), "float16")
    np.testing.assert_array_equal(bound_values(model, "w.weight"), infinite.astype(np.float16))
