"""An optimised graph gives the outputs of the captured one, from fewer nodes, without a weight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

from surgery.checkpoint import Checkpoint
from surgery.export.bind import bind
from surgery.export.capture import PARAMETERS, UNBOUND
from surgery.export.expressions import Expressions, Tensor
from surgery.export.fold import fold
from surgery.export.graphs import Wanted, captured
from surgery.export.optimise import optimise
from surgery.export.tied import share_tied
from tests.batches import BATCHES

CASES = (
    ("gpt2", "causal-lm-with-past"),
    ("bloom", "causal-lm-with-past"),
    ("llama-biased", "causal-lm"),
    ("mixtral", "causal-lm-with-past"),
    ("gemma3_text", "causal-lm-with-past"),
    ("bert", "encoder"),
)
"""A head tied to the embedding, fused projections, experts, windows, an encoder."""
Base = Callable[..., Path]


def graph(folder: Path, task: str, opset: int = 20) -> Any:
    return captured(Wanted(folder, task, opset, "float32"))[0]


def parameters(model: Any) -> Expressions:
    names = json.loads(model.metadata_props[PARAMETERS])
    return {name: Tensor(name) for name in model.graph.initializers if name in names}


def optimised(folder: Path, task: str) -> tuple[Any, Expressions]:
    model = graph(folder, task)
    expressions = fold(model)
    share_tied(model, expressions)
    optimise(model, expressions)
    return model, expressions


def session(model: Any, expressions: Expressions, folder: Path) -> Any:
    """onnxruntime on the graph, with every number in it and nothing optimised any further."""
    checkpoint = Checkpoint.open(folder)
    for name, expression in bind(model, expressions, checkpoint).items():
        tensor = onnx_ir.tensor(expression.read(checkpoint), name=name)
        model.graph.initializers[name].const_value = tensor
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString(), options)


def feeds(runner: Any) -> list[dict[str, Any]]:
    """Every batch, without a cache and with one of three positions."""
    inputs = {value.name: value.shape for value in runner.get_inputs()}
    caches = [name for name in inputs if name.startswith("past_key_values.")]
    found = []
    for batch in BATCHES:
        for past in (0, 3) if caches else (0,):
            rows = len(batch.input_ids)
            feed = {name: array for name, array in batch.inputs().items() if name in inputs}
            seen = np.ones((rows, past), np.int64)
            feed["attention_mask"] = np.concatenate([seen, feed["attention_mask"]], axis=1)
            if "position_ids" in feed:
                feed["position_ids"] = feed["position_ids"] + past
            for n, name in enumerate(caches):
                _, heads, _, width = inputs[name]
                generator = np.random.default_rng(n)
                cache = generator.standard_normal((rows, heads, past, width), np.float32)
                feed[name] = cache
            found.append(feed)
    return found


@pytest.mark.parametrize(("family", "task"), CASES)
def test_outputs_stay_what_they_are(base_of: Base, family: str, task: str) -> None:
    folder = base_of(family)
    whole = graph(folder, task)
    count = len(whole.graph)
    before = session(whole, parameters(whole), folder)
    model, expressions = optimised(folder, task)
    after = session(model, expressions, folder)
    assert len(model.graph) < count
    assert [v.name for v in before.get_outputs()] == [v.name for v in after.get_outputs()]
    for feed in feeds(before):
        for expected, found in zip(before.run(None, feed), after.run(None, feed), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_the_graph_is_plain_and_says_the_type_of_every_value(
    base_of: Base, family: str, task: str
) -> None:
    model, expressions = optimised(base_of(family), task)
    kinds = {node.op_type for node in model.graph}
    assert {node.domain for node in model.graph} == {""}
    assert not kinds & {"Constant", "Identity", "CastLike", "SplitToSequence", "SequenceAt"}
    assert all(value.type for node in model.graph for value in node.outputs)
    known = [v.shape is not None for node in model.graph for v in node.outputs]
    assert all(known)
    parameters = [model.graph.initializers[name] for name in expressions]
    assert {value.const_value.location for value in parameters} == {UNBOUND}


def test_nodes_are_called_after_their_modules(base_of: Base) -> None:
    model, _ = optimised(base_of("llama-biased"), "causal-lm")
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert "model.layers.1.self_attn.q_proj/MatMul_1" in names
    assert all("/" in name or name == "logits" for name in names), names


def test_the_same_graph_comes_out_whatever_order_sets_have(base_of: Base) -> None:
    code = (
        "import sys, hashlib; from pathlib import Path\n"
        "from surgery.export.capture import serialized\n"
        "from tests.export.test_optimise import optimised\n"
        "data = serialized(optimised(Path(sys.argv[1]), 'encoder')[0])\n"
        "print(hashlib.sha256(data).hexdigest())\n"
    )
    folder = base_of("bert")
    graph(folder, "encoder")

    def digest(seed: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": ".:tests"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    assert digest("1") == digest("2")


def test_a_tied_matrix_is_one_initializer(base_of: Base) -> None:
    model, expressions = optimised(base_of("llama-biased"), "causal-lm")
    [name] = [n for n, value in model.graph.initializers.items() if 101 in value.shape.numpy()]
    assert expressions[name] == Tensor(name)
    users = {node.op_type for node in model.graph if model.graph.initializers[name] in node.inputs}
    assert users == {"Gather", "Gemm"}


def test_a_transposed_matrix_that_something_else_reads_is_kept() -> None:
    made = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 4] x, int64[m] ids) => (float[n, 3] y, float[m, 4] rows, float[3, 4] s)
        <float[3, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>
        {
            t = Transpose <perm = [1, 0]> (w)
            y = MatMul (x, t)
            rows = Gather (w, ids)
            u = Sigmoid (t)
            s = Transpose <perm = [1, 0]> (u)
        }"""
    )
    model = onnx_ir.from_proto(made)
    model.metadata_props[PARAMETERS] = json.dumps({"w": ["w"]})
    expressions = fold(model)
    share_tied(model, expressions)
    assert set(expressions) == {"w", "w.T"}
    assert [node.op_type for node in model.graph if node.op_type in ("MatMul", "Gemm")] == ["Gemm"]
