"""What ships is the file on disk: every parameter becomes an expression in its own tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir
import pytest
from safetensors.numpy import load_file, save_file

from surgery.checkpoint import Checkpoint
from surgery.errors import ExportError, OnnxError
from surgery.export.bind import bind, numbers, refuse_infinite_constants, refuse_overflow, unused
from surgery.export.capture import PARAMETERS, PREFIX, placeholder
from surgery.export.expressions import Cast, Concat, Expressions, Stack, Tensor, Transpose
from tests.models import make

NORM = "model.norm.weight"
Base = Callable[..., Path]


def graph(
    shapes: dict[str, tuple[int, ...]],
    dtype: str = "float32",
    prefix: str = "model.",
    tied: tuple[str, ...] = (),
) -> Any:
    """A graph of parameters without numbers, as capture leaves it; those `tied` are one."""
    values = []
    for name, shape in shapes.items():
        kind = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(np.dtype(dtype)))
        value = onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=kind)
        value.const_value = placeholder(value)
        values.append(value)
    model = onnx_ir.Model(
        onnx_ir.Graph([], [], nodes=[], initializers=values, name="g"), ir_version=10
    )
    names = {name: list(tied) if name in tied else [name] for name in shapes}
    model.metadata_props[PARAMETERS] = json.dumps(names)
    model.metadata_props[PREFIX] = prefix
    return model


def bound(model: Any, folder: Path) -> Expressions:
    parameters: Expressions = {name: Tensor(name) for name in model.graph.initializers}
    return bind(model, parameters, Checkpoint.open(folder))


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint whose tensors `change` has edited in place."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_parameter_is_its_tensor_with_or_without_the_base_models_prefix(
    base_of: Base, tmp_path: Path
) -> None:
    def strip(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    whole, name = base_of("gpt2"), "transformer.wte.weight"
    model = graph({name: (101, 32)}, prefix="transformer.")
    assert bound(model, whole) == {name: Tensor(name)}
    bare = rewritten(whole, tmp_path / "bare", strip)
    assert bound(model, bare) == {name: Tensor("wte.weight")}


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("computed", ["float32", "float16"])
def test_stored_dtypes_are_cast_to_the_compute_dtype(
    base_of: Base, stored: str, computed: str
) -> None:
    folder = base_of("llama", stored)
    expression = bound(graph({NORM: (32,)}, computed), folder)[NORM]
    assert expression == (Tensor(NORM) if stored == computed else Cast(Tensor(NORM), computed))
    weight = Checkpoint.open(folder).read(NORM)
    kind = ml_dtypes.bfloat16 if stored == "bfloat16" else np.dtype(stored)
    assert weight.dtype == kind
    [found] = numbers(expression, Checkpoint.open(folder))
    np.testing.assert_array_equal(found, weight.astype(np.float32).astype(computed))
    assert found.dtype == computed


def test_what_a_graph_made_of_parameters_is_bound_to_the_same_of_tensors(base_of: Base) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    model = graph({name: (48, 32), f"{name}.T": (32, 48)})
    expressions = {f"{name}.T": Transpose(Tensor(name))}
    checkpoint = Checkpoint.open(base_of("llama", "bfloat16"))
    found = bind(model, expressions, checkpoint)
    assert found == {f"{name}.T": Cast(Transpose(Tensor(name)), "float32")}
    expected = checkpoint.read(name).astype(np.float32).T
    np.testing.assert_array_equal(
        np.concatenate(list(numbers(found[f"{name}.T"], checkpoint))), expected
    )


def test_experts_are_stacks_of_their_tensors(base_of: Base) -> None:
    name, stem = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts"
    folder = base_of("qwen3_moe")
    found = bound(graph({name: (3, 80, 32)}), folder)[name]
    pairs = [
        Concat((Tensor(f"{stem}.{n}.gate_proj.weight"), Tensor(f"{stem}.{n}.up_proj.weight")))
        for n in range(3)
    ]
    assert found == Stack(tuple(pairs))
    tensors = load_file(folder / "model.safetensors")
    [array] = numbers(found, Checkpoint.open(folder))
    np.testing.assert_array_equal(array[2, 40:], tensors[f"{stem}.2.up_proj.weight"])


def test_a_parameter_without_a_tensor_or_of_another_shape_or_type_is_an_error(
    base_of: Base, tmp_path: Path
) -> None:
    folder = base_of("llama")
    with pytest.raises(ExportError, match=r"no tensor for parameter 'w\.weight'"):
        bound(graph({"w.weight": (32,)}), folder)
    with pytest.raises(ExportError, match=r"F32 \[32\] for .*; the graph expects .* \[33\]"):
        bound(graph({NORM: (33,)}), folder)

    def narrow(tensors: dict[str, Any]) -> None:
        tensors[NORM] = tensors[NORM].astype(np.int32)

    with pytest.raises(ExportError, match=r"gives I32 \[32\]"):
        bound(graph({NORM: (32,)}), rewritten(folder, tmp_path / "i", narrow))


def test_tied_parameters_are_one_tensor_and_may_not_differ_on_disk(tmp_path: Path) -> None:
    names = ("lm_head.weight", "model.embed_tokens.weight")
    tied = make("llama", tmp_path / "tied", tie_word_embeddings=True)
    model = graph({names[0]: (101, 32)}, tied=names)
    assert bound(model, tied) == {names[0]: Tensor(names[1])}

    def twice(tensors: dict[str, Any]) -> None:
        tensors[names[0]] = tensors[names[1]].copy()

    both = rewritten(tied, tmp_path / "both", twice)
    assert bound(model, both)[names[0]] in (Tensor(names[0]), Tensor(names[1]))

    def differ(tensors: dict[str, Any]) -> None:
        tensors[names[0]] = tensors[names[1]] + 1

    with pytest.raises(ExportError, match="they differ"):
        bound(model, rewritten(tied, tmp_path / "other", differ))


def test_tensors_the_graph_does_not_read_are_named(base_of: Base) -> None:
    checkpoint = Checkpoint.open(base_of("llama"))
    found = bound(graph({NORM: (32,)}), base_of("llama"))
    assert unused(checkpoint, found) == tuple(sorted(set(checkpoint.tensors) - {NORM}))


def with_value(base: Path, folder: Path, value: float) -> Checkpoint:
    def change(tensors: dict[str, Any]) -> None:
        tensors[NORM][3] = value

    return Checkpoint.open(rewritten(base, folder, change))


@pytest.mark.parametrize("value", [-1e6, 65520.0])
def test_float16_refuses_what_it_cannot_hold(base_of: Base, tmp_path: Path, value: float) -> None:
    checkpoint = with_value(base_of("llama"), tmp_path / "m", value)
    found = bound(graph({NORM: (32,)}, "float16"), checkpoint.root)
    message = rf"'model\.norm\.weight' holds {abs(value):g}, which does not fit float16"
    with pytest.raises(OnnxError, match=message.replace("+", r"\+")):
        list(numbers(found[NORM], checkpoint))
    with pytest.raises(OnnxError, match=message.replace("+", r"\+")):
        refuse_overflow(found, checkpoint)


@pytest.mark.parametrize(("value", "dtype"), [(np.inf, "float16"), (-np.inf, "float32")])
def test_a_constant_of_the_graph_may_not_be_infinite_in_float16(
    base_of: Base, value: float, dtype: str
) -> None:
    checkpoint = Checkpoint.open(base_of("llama"))
    model = graph({NORM: (32,)}, dtype)
    found = bound(model, checkpoint.root)
    tensor = onnx_ir.tensor(np.array(value, dtype), name="mask")
    model.graph.register_initializer(onnx_ir.Value(name="mask", const_value=tensor))
    if dtype == "float32":
        refuse_infinite_constants(model, found, checkpoint)
        return
    with pytest.raises(OnnxError, match="constant 'mask' that does not fit float16"):
        refuse_infinite_constants(model, found, checkpoint)


@pytest.mark.parametrize("value", [np.inf, np.nan, 65504.0, 65519.0, 1e-9])
def test_float16_keeps_what_is_not_finite_and_rounds_the_rest(
    base_of: Base, tmp_path: Path, value: float
) -> None:
    checkpoint = with_value(base_of("llama"), tmp_path / "m", value)
    found = bound(graph({NORM: (32,)}, "float16"), checkpoint.root)
    [half] = numbers(found[NORM], checkpoint)
    np.testing.assert_array_equal(half[3], np.float16(value))
    refuse_overflow(found, checkpoint)
