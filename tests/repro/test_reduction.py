"""Halving, renaming, and less of everything: each on models made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper, parser

from surgery.errors import InputError
from surgery.repro import bundle
from surgery.repro.parts import renamed
from surgery.repro.reduction import last_failing
from surgery.repro.runs import outputs, problem
from surgery.repro.shrinking import Case, fewer_columns, fewer_tokens, shrunk

HEAD = '<ir_version: 8, opset_import: ["": 20]> part '


@given(st.integers(0, 300), st.data())
def test_the_last_failing_cut_is_found_in_few_runs(count: int, data: st.DataObject) -> None:
    last = data.draw(st.integers(0, count))
    asked: list[int] = []

    def fails(number: int) -> bool:
        asked.append(number)
        return number <= last

    assert last_failing(count, fails) == last
    assert len(asked) <= 11


def made(text: str, **weights: np.ndarray[Any, Any]) -> onnx.ModelProto:
    model = parser.parse_model(HEAD + text)
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def wanted(value: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    real = np.ones(value.shape[:2], np.bool_)
    facts = {"name": np.array("y"), "limit": np.array(1e-3), "strict": np.array(False)}
    return {"value": value, "real": real, "finite": real, **facts}


def product(weight: np.ndarray[Any, Any], bias: np.ndarray[Any, Any]) -> onnx.ModelProto:
    text = "(float[B, L, K] x) => (float[B, L, N] y) { z = MatMul(x, w) y = Add(z, b) }"
    return made(text, w=weight, b=bias)


@pytest.fixture
def large() -> Case:
    """One column of a matrix of 8 MB is wrong, and that in one row of the batch alone."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((500, 4000)).astype(np.float32) / 20
    bias = generator.standard_normal(4000).astype(np.float32)
    x = generator.standard_normal((3, 9, 500)).astype(np.float32)
    x[[0, 2], :, 7] = 0
    x[1, :4, 7] = 0
    stale = weight.copy()
    stale[7, 1234] += 1
    inputs = {"x": x}
    right = product(weight, bias)
    return Case(product(stale, bias), right, inputs, wanted(outputs(right, inputs)["y"]))


def shows(case: Case) -> bool:
    assert case.passing is not None
    wrong = problem(case.failing, case.inputs, case.expected)
    return wrong == "value" and not problem(case.passing, case.inputs, case.expected)


def test_what_is_left_is_one_row_few_positions_and_the_wrong_column(large: Case) -> None:
    assert shows(large)
    small = shrunk(large, rows=3, length=9, shows=shows)
    assert shows(small)
    assert small.inputs["x"].shape == (1, 8, 500)
    assert small.expected["value"].shape == (1, 8, 16)
    assert len(small.failing.SerializeToString()) < 40_000


def test_columns_are_left_alone_where_something_mixes_them(large: Case) -> None:
    text = """(float[B, L, K] x) => (float[B, L, N] y)
    { z = MatMul(x, w) s = Add(z, b) y = Softmax(s) }"""
    weights = {t.name: numpy_helper.to_array(t) for t in large.failing.graph.initializer}
    mixed = Case(made(text, **weights), None, large.inputs, large.expected)
    assert fewer_columns(mixed) is None


def test_only_rows_that_are_looked_up_are_kept() -> None:
    table = np.arange(40_000 * 8, dtype=np.float32).reshape(40_000, 8)
    ids = np.array([[39_999, 5, 5, 70]])
    text = "(int64[B, L] ids) => (float[B, L, N] y) { y = Gather(t, ids) }"
    model = made(text, t=table)
    case = Case(model, None, {"ids": ids}, wanted(table[ids]))
    small = fewer_tokens(case)
    assert small is not None
    (kept,) = small.failing.graph.initializer
    assert list(kept.dims) == [3, 8]
    assert not problem(small.failing, small.inputs, small.expected)


def test_ids_that_are_also_computed_with_are_left_alone() -> None:
    text = """(int64[B, L] ids) => (float[B, L, N] y)
    { r = Gather(t, ids) c = Cast<to: int = 1>(ids) u = Unsqueeze(c, a) y = Add(r, u) }"""
    table = np.ones((9, 4), np.float32)
    model = made(text, t=table, a=np.array([2], np.int64))
    case = Case(model, None, {"ids": np.array([[1, 2]])}, wanted(np.ones((1, 2, 4), np.float32)))
    assert fewer_tokens(case) is None


def test_a_graph_that_fails_gives_nothing_and_a_slip_of_ours_is_an_error() -> None:
    here = np.ones(1, np.float32)
    assert outputs(made("(float[1] a) => (float[1] b) { b = Nothing(a) }"), {"a": here}) == {}
    model = made("(float[1] a) => (float[1] b) { b = Neg(a) }")
    assert outputs(model, {"a": np.ones((1, 1), np.float32)}) == {}, "of another rank"
    with pytest.raises(KeyError):
        outputs(model, {"another": here})


def test_a_name_that_is_taken_gives_way() -> None:
    model = made("(float[1] a) => (float[1] c) { b = Neg(a) c = Abs(b) }")
    other = renamed(model, {"a": "b"})
    onnx.checker.check_model(other)
    found = outputs(other, {"b": np.array([-3], np.float32)})
    assert found["c"] == 3


def test_a_bundle_that_is_too_large_is_refused(
    large: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = dict.fromkeys(("site", "fingerprint", "where", "message", "batch", "changed"), "s")
    with pytest.raises(InputError, match="expected at most 5000000"):
        bundle.write(large, told | {"problem": "value"}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_archive_holds_no_objects_and_no_clock() -> None:
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        bundle.archive({"x": np.array([{}])})
    arrays = {"b": np.arange(3), "a": np.array("name")}
    assert bundle.archive(arrays) == bundle.archive(dict(reversed(arrays.items())))
