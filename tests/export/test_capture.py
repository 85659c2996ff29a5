"""Exported graphs are the model: any shape, either padding, cached or not, to the last bits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from surgery import process
from surgery.errors import ArchitectureError, CheckpointError, ExportError, InputError
from surgery.export import LAYOUTS, TASKS, default_task, export
from surgery.export.capture import _check_dynamic
from surgery.export.load import load_model
from surgery.runtimes import RUNTIMES, ModelRef, Runtime
from tests.batches import BATCHES
from tests.here import in_this_process
from tests.models import DECODERS, Zoo, make

TOLERANCE = 1e-5
PAIRS = [(f, t) for f in DECODERS for t in ("causal-lm", "causal-lm-with-past")]
PAIRS.append(("bert", "encoder"))


def torch_and_onnx(zoo: Zoo, family: str, task: str) -> tuple[Runtime, Runtime]:
    onnx_file = zoo.onnx(family, task)
    return (
        RUNTIMES["torch"](ModelRef("torch", zoo.checkpoint(family), task), 1),
        RUNTIMES["onnxruntime"](ModelRef("onnxruntime", onnx_file, task), 1),
    )


@pytest.mark.parametrize(("family", "task"), PAIRS)
def test_the_graph_agrees_with_the_model_on_every_shape_and_padding(
    zoo: Zoo, family: str, task: str
) -> None:
    torch_model, onnx_model = torch_and_onnx(zoo, family, task)
    output = TASKS[task].output
    for batch in BATCHES:
        expected = torch_model.infer(batch.inputs())[output][batch.attention_mask == 1]
        found = onnx_model.infer(batch.inputs())[output][batch.attention_mask == 1]
        assert np.abs(expected).max() > 0.1, batch.name
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE, err_msg=batch.name)


@pytest.mark.parametrize(("family", "task"), PAIRS)
def test_inputs_and_outputs_have_optimums_names_and_free_axes(
    zoo: Zoo, family: str, task: str
) -> None:
    graph = onnx.load(zoo.onnx(family, task), load_external_data=False).graph
    wanted = list(TASKS[task].inputs)
    results = [TASKS[task].output]
    if TASKS[task].cache:
        each = [f"{n}.{part}" for n in range(2) for part in ("key", "value")]
        wanted += [f"past_key_values.{name}" for name in each]
        results += [f"present.{name}" for name in each]
    assert [value.name for value in graph.input] == wanted
    assert [value.name for value in graph.output] == results
    for value in [*graph.input, *graph.output]:
        axes = value.type.tensor_type.shape.dim
        length = 2 if value.name.partition(".")[0] in ("past_key_values", "present") else 1
        assert axes[0].dim_param == "batch_size", value.name
        assert axes[length].dim_param, value.name


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("step", [1, 3])
def test_decoding_from_a_cache_equals_the_whole_sequence(zoo: Zoo, family: str, step: int) -> None:
    import onnxruntime

    batch = next(batch for batch in BATCHES if batch.name == "left")
    model = RUNTIMES["torch"](ModelRef("torch", zoo.checkpoint(family), "causal-lm"), 1)
    whole = model.infer(batch.inputs())["logits"]
    session = onnxruntime.InferenceSession(zoo.onnx(family, "causal-lm-with-past"))
    names = [value.name for value in session.get_outputs()]
    cut = batch.input_ids.shape[1] - step
    feed = {name: array[:, :cut] for name, array in batch.inputs().items()} | empty_cache(session)
    first = dict(zip(names, session.run(None, feed), strict=True))
    cached = {
        name.replace("present", "past_key_values"): array
        for name, array in first.items()
        if name != "logits"
    }
    feed = {name: array[:, cut:] for name, array in batch.inputs().items()} | cached
    feed["attention_mask"] = batch.attention_mask
    then = session.run(["logits"], feed)[0]
    real = batch.attention_mask[:, :cut] == 1
    np.testing.assert_allclose(first["logits"][real], whole[:, :cut][real], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(then, whole[:, cut:], rtol=0, atol=TOLERANCE)


def empty_cache(session: Any) -> dict[str, Any]:
    return {
        value.name: np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }


@pytest.mark.parametrize("family", ["llama"])
def test_float16_and_bfloat16_weights_export(zoo: Zoo, family: str) -> None:
    narrow = zoo.onnx(family, "causal-lm", dtype="float16", stored="bfloat16")
    model = RUNTIMES["onnxruntime"](ModelRef("onnxruntime", narrow, "causal-lm"), 1)
    source = zoo.checkpoint(family, "bfloat16")
    reference = RUNTIMES["torch"](ModelRef("torch", source, "causal-lm"), 1)
    logits = model.infer(BATCHES[0].inputs())["logits"]
    assert logits.dtype == np.float16
    expected = reference.infer(BATCHES[0].inputs())["logits"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-2)


def test_nothing_of_this_machine_and_no_trace_is_in_the_file(zoo: Zoo) -> None:
    data = zoo.onnx("bert", "encoder").read_bytes()
    data += zoo.onnx("bert", "encoder", layout="linked").read_bytes()
    for mark in (b"site-packages", b"stack_trace", b".py", str(zoo.root).encode()):
        assert mark not in data


def test_exporting_is_silent_and_gives_the_same_bytes_again(
    zoo: Zoo, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured anew, in this process."""
    earlier = zoo.onnx("bert", "encoder")
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught, in_this_process():
        warnings.simplefilter("always")
        again = export(zoo.checkpoint("bert"), tmp_path / "again")
    assert not again.cached
    assert capfd.readouterr() == ("", "")
    assert not caught
    for name in ("model.onnx", "model.onnx.data"):
        assert (again.output / name).read_bytes() == earlier.with_name(name).read_bytes()


def test_a_baked_in_axis_is_an_error() -> None:
    import onnx_ir

    def value(name: str, shape: list[Any]) -> Any:
        return onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape))

    inputs = [value("input_ids", ["b", "l"]), value("attention_mask", ["b", 7])]
    outputs = [value("last_hidden_state", ["b", "l", 32])]
    graph = onnx_ir.Graph(inputs, outputs, nodes=[])
    with pytest.raises(ExportError, match=r"axis 1 of attention_mask was fixed at \[b,7\]"):
        _check_dynamic(graph, TASKS["encoder"])


def test_the_task_follows_the_family(zoo: Zoo, tmp_path: Path) -> None:
    assert default_task(zoo.checkpoint("llama")).name == "causal-lm"
    assert default_task(zoo.checkpoint("bert")).name == "encoder"
    strange = make("llama", tmp_path / "m")
    text = (strange / "config.json").read_text()
    (strange / "config.json").write_text(text.replace('"llama"', '"lama"'))
    with pytest.raises(ArchitectureError, match="model_type 'lama'"):
        export(strange, tmp_path / "out")
    with pytest.raises(InputError, match="did you mean 'encoder'"):
        export(zoo.checkpoint("bert"), tmp_path / "out", task="encode")


WRONG_TASKS = {
    ("bert", "causal-lm"): "bert is an encoder; its tasks are: encoder",
    ("bert", "causal-lm-with-past"): "bert is an encoder; its tasks are: encoder",
    ("llama", "encoder"): "llama is a decoder; its tasks are: causal-lm, causal-lm-with-past",
}


@pytest.mark.parametrize(("family", "task"), WRONG_TASKS)
def test_a_task_of_another_kind_of_model_is_refused_before_a_child_starts(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, task: str
) -> None:
    monkeypatch.delattr(process, "run")
    for layout in LAYOUTS:
        with pytest.raises(InputError, match=WRONG_TASKS[family, task]):
            export(zoo.checkpoint(family), task=task, layout=layout)
    assert list(tmp_path.iterdir()) == []


def test_a_parameter_without_a_tensor_is_not_filled_with_random_numbers(tmp_path: Path) -> None:
    """`attention_bias` asks for biases that the file does not have."""
    path = make("llama", tmp_path / "m")
    text = (path / "config.json").read_text()
    changed = text.replace('"attention_bias": false', '"attention_bias": true')
    assert changed != text
    (path / "config.json").write_text(changed)
    with pytest.raises(CheckpointError, match=r"8 parameters .* first '.*bias'"):
        load_model(path, TASKS["causal-lm"], "float32")
    with pytest.raises(ArchitectureError, match="lacks"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
