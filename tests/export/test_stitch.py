"""A stitched graph is the whole trace, to the byte; layers that differ are not stitched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest

from surgery.export import TASKS, capture
from surgery.export.capture import serialized
from surgery.export.stitch import Layers, Unstitchable, stitch
from surgery.runtimes import RUNTIMES, ModelRef
from tests.batches import BATCHES
from tests.exports import ENCODERS, PROVED, STITCHED, VARIANTS, WINDOWED
from tests.models import Zoo, deep, family_of

PAST = "causal-lm-with-past"
SLIDING, WIDE = "sliding_attention", "full_attention"

TELLING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", PAST, deep("llama", 3)),
    "windows in every other layer": (
        "gemma2", "causal-lm", {**deep("gemma2", 5), "layer_types": [SLIDING, WIDE] * 2 + [SLIDING]}
    ),
    "one layer without a window": (
        "gemma3_text", "causal-lm",
        {**deep("gemma3_text", 4), "layer_types": [SLIDING] * 3 + [WIDE]},
    ),
    "dense and sparse": ("qwen3_moe", PAST, deep("qwen3_moe", 4)),
    "bert": ("bert", "encoder", deep("bert", 3)),
    "gpt2": ("gpt2", "causal-lm", deep("gpt2", 3)),
}  # fmt: skip

TASKS_OF = {
    model: ("encoder",) if family_of(model) in ENCODERS else ("causal-lm", PAST)
    for model in (*PROVED[STITCHED], *VARIANTS)
}
FULL = {
    f"{model}-{task}": (model, task, deep(model, 5))
    for model in TASKS_OF
    for task in TASKS_OF[model]
} | {
    f"{m}-windowed": (m, PAST, {**deep(m, 5), **fields})
    for m, fields in WINDOWED.items()
    if m != "gemma3_text"
}


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bool]:
    """Of every trace from here on, whether it was a whole one; none is cached."""
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    found: list[bool] = []
    original = capture._capture

    def spy(*options: Any, whole: bool) -> Any:
        found.append(whole)
        return original(*options, whole=whole)

    monkeypatch.setattr(capture, "_capture", spy)
    return found


def telling(case: str) -> Any:
    """The largest two of these models are of the campaign."""
    long = case in ("one layer without a window", "dense and sparse")
    return pytest.param(case, marks=pytest.mark.campaign) if long else case


def assert_stitched_is_whole(model: Path, task: str, traces: list[bool]) -> None:
    stitched = serialized(capture.capture(model, task))
    assert traces == [False], "was taken whole"
    assert stitched == serialized(capture.capture(model, task, whole=True))
    assert traces == [False, True]


@pytest.mark.parametrize("case", [telling(case) for case in TELLING])
def test_of_few_layers_the_whole_graph_is_made(zoo: Zoo, case: str, traces: list[bool]) -> None:
    model, task, fields = TELLING[case]
    assert_stitched_is_whole(zoo.checkpoint(model, **fields), task, traces)


@pytest.mark.campaign
@pytest.mark.parametrize("case", FULL)
def test_of_few_layers_any_familys_graph_is_made(zoo: Zoo, case: str, traces: list[bool]) -> None:
    model, task, fields = FULL[case]
    assert_stitched_is_whole(zoo.checkpoint(model, **fields), task, traces)


def assert_is_the_model(zoo: Zoo, model: str, task: str, fields: dict[str, Any]) -> None:
    """Within eight times what float32 itself is away from float64."""
    source = zoo.checkpoint(model, **fields)
    graph = ModelRef("onnxruntime", zoo.onnx(model, task, layout="linked", **fields), task)
    refs = (ModelRef("torch", source, task, "float64"), ModelRef("torch", source, task), graph)
    exact, single, found = (RUNTIMES[ref.runtime](ref, 1) for ref in refs)
    output = TASKS[task].output
    for batch in BATCHES:
        real = batch.attention_mask == 1
        a, b, c = (run.infer(batch.inputs())[output][real] for run in (exact, single, found))
        assert np.abs(c - b).max() <= 8 * np.abs(b - a).max(), batch.name


@pytest.mark.parametrize("model", ["gpt2", pytest.param("gemma3_text", marks=pytest.mark.campaign)])
def test_twelve_stitched_layers_are_the_model(zoo: Zoo, model: str, traces: list[bool]) -> None:
    """gemma3_text has a layer without a window in every six."""
    assert_is_the_model(zoo, model, "causal-lm", deep(model, 12))
    assert traces == [False]


def test_layers_that_differ_in_more_than_parameters_are_traced_one_by_one(
    zoo: Zoo, traces: list[bool]
) -> None:
    fields = {**deep("gpt2", 3), "scale_attn_by_inverse_layer_idx": True}
    assert_is_the_model(zoo, "gpt2", "causal-lm", fields)
    assert traces == [False, True]


BLOCK = "m.layers.{layer}"
WIDTH = 4


class Sketch:
    """A small traced graph: h = x + emb; in each layer h = h + leaky(h W) · c; then h W'.

    The first parameters of `layer` say what is otherwise in one layer.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.nodes: list[Any] = []

    def value(self, name: str, number: float | None = None) -> Any:
        """A parameter, or a constant of that number; the same one when asked for again."""
        if name not in self.values:
            data = np.full((WIDTH, WIDTH), 0.5 if number is None else number, np.float32)
            self.values[name] = onnx_ir.Value(
                name=name,
                shape=onnx_ir.Shape(data.shape),
                type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
                const_value=onnx_ir.tensor(data, name=name),
            )
        return self.values[name]

    def node(self, kind: str, inputs: list[Any], scope: str, **attributes: Any) -> Any:
        path = repr(["", "m", *([scope] if scope else []), "node"])
        made = onnx_ir.node(
            kind, inputs, attributes, metadata_props={"pkg.torch.onnx.name_scopes": path}
        )
        made.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(made)
        return made.outputs[0]

    def layer(
        self,
        number: int,
        hidden: Any,
        *,
        alpha: float = 0.5,
        constant: float = 2.0,
        swapped: bool = False,
        weight: str = "",
        also: Any = None,
        more: bool = False,
    ) -> tuple[Any, Any]:
        """(What the layer hands on, a value within)."""
        scope = BLOCK.format(layer=number)
        product = self.node("MatMul", [hidden, self.value(weight or f"{scope}.w")], scope)
        bent = self.node("LeakyRelu", [product], scope, alpha=alpha)
        pair = [bent, self.value(f"constant_{constant}", constant)]
        scaled = self.node("Div", pair[::-1] if swapped else pair, scope)
        if also is not None:
            scaled = self.node("Add", [scaled, also], scope)
        if more:
            scaled = self.node("Neg", [scaled], scope)
        return self.node("Add", [hidden, scaled], scope), product

    def graph(self, *layers: dict[str, Any], also_last: bool = False) -> Any:
        """`layers` are the fields of each; `also` and `hidden` in them name an earlier value:
        `embedded`, `within` the layer before, or of the `input`."""
        x = onnx_ir.Value(
            name="x",
            shape=onnx_ir.Shape(["n", WIDTH]),
            type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
        )
        hidden = embedded = self.node("Add", [x, self.value("m.emb")], "")
        known = {"embedded": embedded, "input": x}
        for number, fields in enumerate(layers):
            own = {**fields, "also": known[fields["also"]]} if "also" in fields else dict(fields)
            given = known[own.pop("hidden")] if "hidden" in own else hidden
            hidden, known["within"] = self.layer(number, given, **own)
        if also_last:
            hidden = self.node("Add", [hidden, known["within"]], "")
        out = self.node("MatMul", [hidden, self.value("m.head")], "")
        out.name = "y"
        return onnx_ir.Graph(
            [x],
            [out],
            nodes=self.nodes,
            initializers=list(self.values.values()),
            opset_imports={"": 20},
            name="g",
        )


def stitched(graph: Any, template: tuple[int, ...] = (0, 0, 0, 0)) -> Any:
    parameters = [name for name in graph.initializers if name.startswith("m.")]
    twins = tuple((n, n + 1) for n in range(0, 2 * len(set(template)), 2))
    return stitch(graph, Layers(BLOCK, template, twins), parameters)


def evaluate(graph: Any, numbers: dict[str, Any], x: Any) -> Any:
    from onnx.reference import ReferenceEvaluator

    for name, value in graph.initializers.items():
        if name in numbers:
            value.const_value = onnx_ir.tensor(numbers[name], name=name)
    proto = onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=10))
    return ReferenceEvaluator(proto).run(None, {"x": x})[0]


def test_every_layer_has_its_own_parameters_and_shares_the_rest() -> None:
    """Two kinds of layers in an order of their own; numbers by hand."""
    sketch = Sketch()
    graph = sketch.graph({}, {}, {"alpha": 0.1, "also": "input"}, {"alpha": 0.1, "also": "input"})
    made = stitched(graph, (0, 2, 2, 0, 2))
    names = {f"m.layers.{n}.w" for n in range(5)} | {"m.emb", "m.head", "constant_2.0"}
    assert set(made.initializers) == names
    rng = np.random.default_rng(0)
    numbers = {
        name: rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)
        for name in names - {"constant_2.0"}
    }
    x = rng.normal(size=(4, WIDTH)).astype(np.float32)
    h = x + numbers["m.emb"]
    for n, kind in enumerate((0, 2, 2, 0, 2)):
        z = h @ numbers[f"m.layers.{n}.w"]
        bent = np.where(z < 0, (0.1 if kind else 0.5) * z, z)
        h = h + bent / 2 + (x if kind else 0)
    np.testing.assert_allclose(
        evaluate(made, numbers, x), h @ numbers["m.head"], rtol=1e-4, atol=1e-4
    )


TWINS: dict[str, tuple[dict[str, Any], str]] = {
    "a constant": ({"constant": 3.0}, "in what Div reads"),
    "an attribute": ({"alpha": 0.25}, "at LeakyRelu"),
    "the order of operands": ({"swapped": True}, "in what Div reads"),
    "one operator more": ({"more": True}, "layers 0 and 1 differ$"),
    "a parameter of the other layer": ({"weight": "m.layers.0.w"}, "in what MatMul reads"),
    "a parameter of no layer": ({"weight": "m.shared"}, "in what MatMul reads"),
    "what is read from the other layer": ({"also": "within"}, "is given 2 values"),
    "what is read from before the layers": ({"also": "embedded"}, "is given 2 values"),
    "what it continues": ({"hidden": "embedded"}, "does not continue"),
}


@pytest.mark.parametrize("what", TWINS)
def test_layers_that_are_no_twins_are_told_apart(what: str) -> None:
    fields, message = TWINS[what]
    with pytest.raises(Unstitchable, match=message):
        stitched(Sketch().graph({}, fields))


def test_a_parameter_of_one_layer_that_all_read_is_no_layers_own() -> None:
    """Both read layer 0's: a third would be given a parameter that no model has."""
    same = {"weight": "m.layers.0.w"}
    with pytest.raises(Unstitchable, match="in what MatMul reads"):
        stitched(Sketch().graph(same, same))


def test_a_parameter_of_the_model_that_all_layers_read_stays_the_one() -> None:
    same = {"weight": "m.shared"}
    made = stitched(Sketch().graph(same, same))
    assert set(made.initializers) == {"m.shared", "m.emb", "m.head", "constant_2.0"}


def test_what_follows_the_layers_may_read_the_last_one_alone() -> None:
    with pytest.raises(Unstitchable, match="what follows the layers is given 2 values"):
        stitched(Sketch().graph({}, {}, also_last=True))


def test_a_layer_without_nodes_of_its_own_is_told() -> None:
    graph = Sketch().graph({}, {})
    for node in graph:
        if "layers.0" in node.metadata_props["pkg.torch.onnx.name_scopes"]:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'm', 'node']"
    with pytest.raises(Unstitchable, match=r"layers \[1\] are not all there is"):
        stitched(graph)
