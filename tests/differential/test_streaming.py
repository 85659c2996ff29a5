"""A streamed run gives the verdict of the whole one, and tells which layer brings an error in."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import pytest
from corners import Case, Exporter
from differential.lab import Lab
from here import in_this_process
from models import make
from onnx import ModelProto, helper, numpy_helper
from onnx_files import lookup, save
from recipes import NEURONS, write_recipe

from surgery import pipeline
from surgery.differential import Pair
from surgery.errors import OnnxError
from surgery.evidence import Evidence, LayerError
from surgery.export.lineage import trace
from surgery.localize import LIMIT
from surgery.localize.layers import introduced, streamed
from surgery.report import Report, render
from surgery.runtimes import RUNTIMES, ModelRef, session
from surgery.runtimes.generate import Generation, generate

Plant = Callable[..., Path]
CASES = (
    ("llama", "causal-lm-with-past"),
    pytest.param("gpt2", None, marks=pytest.mark.campaign),
    pytest.param("bert", None, marks=pytest.mark.campaign),
)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_a_clean_conversion_passes_streamed_as_it_does_whole(
    lab: Lab, family: str, task: str | None
) -> None:
    case = lab.case(family, task=task)
    whole = lab.diff_edited(case, task=task)
    found = lab.diff_edited(case, task=task, stream=True)
    assert (whole.verdict, found.verdict) == ("pass", "pass")
    assert (found.compared, found.covered_rows) == (whole.compared, whole.covered_rows)
    # PyTorch's own numbers are the same to the bit, so the noise is.
    assert {(c.edge, c.output): c.noise_max for c in found.conversion if "." not in c.output} == {
        (c.edge, c.output): c.noise_max for c in whole.conversion if "." not in c.output
    }
    assert {(c.edge, c.output) for c in found.conversion} >= {("C_o", found.conversion[0].output)}
    assert len([row for row in found.layers if row.edge == "C_e"]) in (3, 4)
    assert all(0 <= row.introduced <= LIMIT and row.propagated <= LIMIT for row in found.layers)
    assert whole.layers == ()
    assert "introduced/noise" in render(found, "md")
    assert "introduced/noise" not in render(whole, "md")


def test_experts_are_streamed(lab: Lab, tmp_path: Path) -> None:
    model = make("mixtral", tmp_path / "model")
    case = Case(model, model, *[Exporter().export(model, tmp_path / "onnx")] * 2)
    report = lab.diff(case, stream=True)
    assert report.verdict == "pass"
    assert all(row.introduced <= LIMIT for row in report.layers)
    assert [row.end for row in report.layers][-2:] == ["final_norm", "logits"]


@pytest.fixture
def llama(lab: Lab) -> Case:
    return lab.case("llama")


def scale_mlp(model: ModelProto, layer: int) -> None:
    """What the MLP of a layer adds is off by a hundredth."""
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    [node] = [n for n in model.graph.node if any(name in i for i in n.input)]
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1.01), "factor"))
    place = list(model.graph.node).index(node)
    inner = f"{node.output[0]}/right"
    scaled = helper.make_node("Mul", [inner, "factor"], [node.output[0]], name="scaled")
    node.output[0] = inner
    model.graph.node.insert(place + 1, scaled)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_fault_in_a_layer_is_introduced_there_and_propagated_from_there_on(
    lab: Lab, plant: Plant, llama: Case, layer: int
) -> None:
    wrong = plant(llama.onnx, partial(scale_mlp, layer=layer))
    report = lab.diff(llama, onnx=wrong, stream=True, stimuli=[])
    assert report.verdict == "fail"
    assert [row.introduced > LIMIT for row in report.layers] == [
        number == layer + 1 for number in range(4)
    ]
    assert [row.propagated > LIMIT for row in report.layers] == [
        number > layer for number in range(4)
    ]
    [named] = [f for f in report.findings if f.symptom == "introduced error"]
    after = "final_norm" if layer == 1 else f"input_norm.{layer + 1}"
    assert named.site == f"R_o/input_norm.{layer} to {after}"


def test_a_layer_that_is_no_number_is_named() -> None:
    rows = [LayerError("C_o", "a", "b", 1.0, 0.5, 9.0), LayerError("C_o", "b", "c", 1.0, 2.0, 9.0)]
    [finding] = introduced(Evidence({}, layers=tuple(rows)))
    assert finding.symptom == "not found"
    nan = LayerError("C_o", "b", "c", 1.0, float("nan"), 9.0)
    [finding] = introduced(Evidence({}, layers=(rows[0], nan)))
    assert (finding.symptom, finding.site) == ("introduced error", "R_o/b to c")


def test_a_graph_without_a_stream_at_each_layer_is_refused(
    lab: Lab, tmp_path: Path, llama: Case
) -> None:
    other = save(lookup(), tmp_path / "m.onnx")
    with pytest.raises(OnnxError, match=r"cannot be streamed: .* 2 layers .* run without --stream"):
        lab.diff(llama, onnx=other, stream=True, stimuli=[])


def cut(case: Case) -> Pair:
    pair = Pair(case.model, case.onnx)
    with in_this_process():
        return streamed(pair, trace(pair.onnx, pair.model))


def test_one_layer_at_a_time_is_in_a_session_once_for_all_batches(lab: Lab, llama: Case) -> None:
    opened: list[set[str]] = []
    alive: list[Any] = []
    begin = session.open_session

    def watch(model: bytes, *others: Any) -> Any:
        assert not [opened for opened in alive if opened() is not None]
        tensors = onnx.load_model_from_string(model).graph.initializer
        opened.append({t.name for t in tensors if t.name.endswith(".weight")})
        made = begin(model, *others)
        alive.append(weakref.ref(made))
        return made

    with patch.object(session, "open_session", watch):
        lab.diff(llama, stream=True, stimuli=[])
    layers = [{name.split(".layers.")[1][0] for name in n if ".layers." in name} for n in opened]
    # The embedding, its layers, the head, and the embedding again, to look every row up.
    assert layers == [set(), {"0"}, {"1"}, set(), set()]


def test_greedy_responses_of_a_streamed_graph_are_those_of_the_whole(llama: Case) -> None:
    pair = cut(llama)
    request = Generation(tuple((5, 6, 7 + n) for n in range(9)), 3, (2,))
    whole = RUNTIMES["onnxruntime"](ModelRef("onnxruntime", pair.onnx, "causal-lm"), 1)
    ref = ModelRef("onnxruntime-streamed", pair.onnx, "causal-lm", cuts=pair.cuts)
    found = RUNTIMES["onnxruntime-streamed"](ref, 1)
    [expected], [made] = generate(whole, [request]), generate(found, [request])
    assert made.tokens == expected.tokens


def test_validate_streams_too(lab: Lab, tmp_path: Path) -> None:
    model = lab.case("llama").model
    recipe = write_recipe(tmp_path, [NEURONS])
    with lab.here.installed():
        report: Report = pipeline.validate(recipe, model, tmp_path / "out", stream=True)
    assert report.verdict == "pass"
    assert {row.edge for row in report.layers} == {"C_o", "C_e"}
