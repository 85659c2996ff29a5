"""Our definitions of contrib operators give what ONNX Runtime's kernels give."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from surgery.runtimes.attention import ATTENTION
from surgery.runtimes.contrib import CONTRIB
from surgery.runtimes.reference import evaluator

Array = NDArray[Any]
B, S, N, D = 2, 5, 4, 6
WIDTH = N * D


def rand(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def model(
    kind: str, inputs: list[Array | None], outputs: int, domain: str, **attributes: Any
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """One node; an input that is None is left out."""
    names = ["" if array is None else f"in{n}" for n, array in enumerate(inputs)]
    fed = {name: array for name, array in zip(names, inputs, strict=True) if array is not None}
    made = [f"out{n}" for n in range(outputs)]
    node = helper.make_node(kind, names, made, domain=domain, **attributes)
    ports = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for name, a in fed.items()
    ]
    given = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in made]
    for value in given:
        value.ClearField("type")
    graph = helper.make_graph([node], "one", ports, given)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), fed


def both(
    kind: str,
    inputs: list[Array | None],
    outputs: int = 1,
    domain: str = "com.microsoft",
    **more: Any,
) -> list[tuple[Array, Array]]:
    """What our definition gives and what the kernel gives, output by output."""
    proto, fed = model(kind, inputs, outputs, domain, **more)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    theirs = session.run(None, fed)
    return list(zip(evaluator(proto).run(None, fed), theirs, strict=True))


def check(pairs: list[tuple[Array, Array]], real: Array | None = None) -> None:
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        rows = (ours, theirs) if real is None else (ours[real], theirs[real])
        np.testing.assert_allclose(*rows, rtol=2e-5, atol=2e-6)


X, SKIP, GAMMA, BETA, BIAS = (rand(*shape) for shape in ((B, S, 8), (B, S, 8), (8,), (8,), (8,)))
IDS = np.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)
TABLES = (rand(10, 8), rand(7, 8), rand(2, 8))

SIMPLE: list[tuple[str, list[Array | None], dict[str, Any]]] = [
    ("FusedMatMul", [rand(2, 3, 4), rand(2, 5, 4)], {"transB": 1, "alpha": 0.5}),
    ("FusedMatMul", [rand(4, 3), rand(4, 5)], {"transA": 1}),
    ("Gelu", [X], {}),
    ("BiasGelu", [X, BIAS], {}),
    ("FastGelu", [X], {}),
    ("FastGelu", [X, BIAS], {}),
    ("QuickGelu", [X], {"alpha": 1.3}),
    ("QuickGelu", [X], {}),
    ("SkipLayerNormalization", [X, SKIP, GAMMA], {"epsilon": 1e-3}),
    ("SkipLayerNormalization", [X, SKIP, GAMMA, BETA, BIAS], {}),
    ("SkipLayerNormalization", [X, SKIP, GAMMA, None, BIAS], {}),
    ("SkipSimplifiedLayerNormalization", [X, SKIP, GAMMA], {"epsilon": 1e-3}),
    ("SkipSimplifiedLayerNormalization", [X, SKIP, GAMMA, BIAS], {}),
]


@pytest.mark.parametrize(("kind", "inputs", "more"), SIMPLE)
def test_a_definition_gives_what_the_kernel_gives(
    kind: str, inputs: list[Array | None], more: dict[str, Any]
) -> None:
    check(both(kind, inputs, **more))


@pytest.mark.parametrize("axis", [-1, 1])
def test_the_simplified_norm_is_in_the_main_domain(axis: int) -> None:
    scale = rand(*X.shape[axis:])
    check(both("SimplifiedLayerNormalization", [X, scale], domain="", axis=axis, epsilon=1e-3))


@pytest.mark.parametrize("kind", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_the_sum_before_a_norm_is_its_fourth_output(kind: str) -> None:
    proto, fed = model(kind, [X, SKIP, GAMMA], 4, "com.microsoft")
    proto.graph.node[0].output[1:3] = ["", ""]
    del proto.graph.output[1:3]
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    check(list(zip(evaluator(proto).run(None, fed), session.run(None, fed), strict=True)))


@pytest.mark.parametrize("segments", [True, False])
def test_embeddings_with_their_norm(segments: bool) -> None:
    word, position, segment = TABLES
    own = [IDS % 2, segment] if segments else [None, None]
    inputs = [IDS, own[0], word, position, own[1], GAMMA, BETA, MASK]
    check(both("EmbedLayerNormalization", inputs, 2, epsilon=1e-5))


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("size", [D, 4])
@pytest.mark.parametrize("offset", [True, False])
def test_rotary_embedding(interleaved: int, size: int, offset: bool) -> None:
    angles = rand(16, size // 2)
    positions = np.array([3], np.int64) if offset else np.arange(B * S).reshape(B, S) % 9
    partial = {} if size == D else {"rotary_embedding_dim": size, "num_heads": N}
    inputs: list[Array | None] = [rand(B, S, WIDTH), positions, np.cos(angles), np.sin(angles)]
    if partial:
        check(both("RotaryEmbedding", inputs, interleaved=interleaved, **partial))
    else:
        check(both("RotaryEmbedding", inputs, interleaved=interleaved))
        inputs[0] = rand(B, N, S, D)
        check(both("RotaryEmbedding", inputs, interleaved=interleaved))


QKV = [rand(B, S, WIDTH, seed=seed) for seed in range(3)]
PAST = [rand(B, N, 3, D, seed=seed) for seed in range(2)]
ADDED = rand(1, N, S, S)

MULTI: list[tuple[list[Array | None], int, dict[str, Any]]] = [
    ([*QKV], 1, {}),
    ([*QKV], 1, {"scale": 0.3, "unidirectional": 1}),
    ([*QKV, rand(3 * WIDTH)], 3, {}),
    ([*QKV, None, MASK], 1, {"mask_filter_value": -1000.0}),
    ([*QKV, None, np.array([5, 3], np.int32)], 1, {}),
    ([*QKV, None, None, ADDED], 1, {}),
    ([*QKV, None, None, None, *PAST], 3, {"unidirectional": 1}),
    ([QKV[0], rand(B, N, 7, D), rand(B, N, 7, D, seed=1)], 1, {}),
]


@pytest.mark.parametrize(("inputs", "outputs", "more"), MULTI)
def test_attention_of_many_heads(
    inputs: list[Array | None], outputs: int, more: dict[str, Any]
) -> None:
    check(both("MultiHeadAttention", inputs, outputs, num_heads=N, **more))


PROJECTED = [rand(B, S, 8), rand(8, 3 * WIDTH), rand(3 * WIDTH)]
JOINT: list[tuple[list[Array | None], int, dict[str, Any]]] = [
    ([*PROJECTED], 1, {}),
    ([*PROJECTED, MASK], 1, {}),
    ([*PROJECTED, np.array([5, 3], np.int32)], 1, {"scale": 0.2}),
    ([*PROJECTED, None, np.stack(PAST)], 2, {"unidirectional": 1}),
    ([*PROJECTED, None, None, ADDED], 1, {"unidirectional": 1}),
]


@pytest.mark.parametrize(("inputs", "outputs", "more"), JOINT)
def test_attention_that_projects_first(
    inputs: list[Array | None], outputs: int, more: dict[str, Any]
) -> None:
    check(both("Attention", inputs, outputs, num_heads=N, **more))


@pytest.mark.parametrize("held", [0, 3])
@pytest.mark.parametrize(
    "rotary", [{}, {"do_rotary": 1}, {"do_rotary": 1, "rotary_interleaved": 1}]
)
def test_attention_of_groups(held: int, rotary: dict[str, Any]) -> None:
    size, length = 16, 1 if held else S
    heads = [rand(B, length, n * size, seed=n) for n in (N, 2, 2)]
    past = [rand(B, 2, held, size, seed=seed) for seed in range(2)]
    total = np.array(held + length, np.int32)
    totals = np.full(B, held + length - 1, np.int32)
    angles = rand(16, size // 2)
    caches: list[Array] = [np.cos(angles), np.sin(angles)] if rotary else []
    inputs: list[Array | None] = [*heads, *past, totals, total, *caches]
    more = {"num_heads": N, "kv_num_heads": 2, "do_rotary": int(bool(rotary)), **rotary}
    check(both("GroupQueryAttention", inputs, 3, **more))


def test_groups_with_padding_on_the_right_agree_where_tokens_are_real() -> None:
    size = 8
    heads = [rand(B, S, n * size, seed=n) for n in (N, 2, 2)]
    past = [rand(B, 2, 0, size)] * 2
    totals, total = np.array([S - 1, 2], np.int32), np.array(S, np.int32)
    pairs = both(
        "GroupQueryAttention", [*heads, *past, totals, total], 3, num_heads=N, kv_num_heads=2
    )
    check(pairs[:1], np.arange(S)[None] <= totals[:, None])


def test_what_a_definition_leaves_out_is_refused() -> None:
    proto, fed = model(
        "GroupQueryAttention",
        [*(rand(B, S, n * 8) for n in (N, 2, 2)), *[rand(B, 2, 0, 8)] * 2,
         np.array([4, 4], np.int32), np.array(S, np.int32)],
        1, "com.microsoft", num_heads=N, kv_num_heads=2, local_window_size=2,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="windows"):
        evaluator(proto).run(None, fed)


def test_every_definition_is_tested() -> None:
    tested = {kind for kind, _, _ in SIMPLE} | {
        "SimplifiedLayerNormalization", "EmbedLayerNormalization", "RotaryEmbedding",
        "MultiHeadAttention", "Attention", "GroupQueryAttention",
    }  # fmt: skip
    assert {definition.__name__ for definition in (*CONTRIB, *ATTENTION)} == tested
