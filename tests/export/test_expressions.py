"""An expression is its array: whole, in bands, as JSON, and with other expressions put in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.header import encode_header
from surgery.errors import InputError
from surgery.export.casting import cast
from surgery.export.expressions import (
    Cast,
    Concat,
    Expression,
    Item,
    Slice,
    Stack,
    Tensor,
    Transpose,
    from_json,
    item,
    kinds,
    substitute,
    transpose,
)

DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
SHAPES = ((4, 6), (6, 4), (4, 4), (3, 4, 6), (7,))
Arrays = dict[str, np.ndarray[Any, Any]]


def random_arrays() -> Arrays:
    """Three tensors of every shape and dtype, called after both."""
    generator = np.random.default_rng(0)
    return {
        f"{dtype}.{'x'.join(map(str, shape))}.{n}": generator.standard_normal(shape).astype(kind)
        for dtype, kind in DTYPES.items()
        for shape in SHAPES
        for n in range(3)
    }


ARRAYS = random_arrays()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    header: dict[str, Any] = {}
    for name, array in ARRAYS.items():
        begin = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        header[name] = {
            "dtype": name.partition(".")[0],
            "shape": list(array.shape),
            "data_offsets": [begin, begin + array.nbytes],
        }
    raw = encode_header(header)
    data = b"".join(array.tobytes() for array in ARRAYS.values())
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return Checkpoint.open(folder)


def evaluate(expression: Expression, arrays: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """The whole array by numpy alone."""
    operands = [evaluate(operand, arrays) for operand in expression.operands()]
    match expression:
        case Tensor(name):
            return np.asarray(arrays[name])
        case Cast(_, to):
            # bfloat16 reaches float16 by way of float32, which holds both exactly.
            wide = operands[0].astype(np.float32)
            return wide.astype(ml_dtypes.bfloat16 if to == "bfloat16" else np.dtype(to))
        case Transpose():
            return np.swapaxes(operands[0], -1, -2)
        case Slice(_, axis, start, stop):
            return np.take(operands[0], range(start, stop), axis)
        case Concat(_, axis):
            return np.concatenate(operands, axis)
        case Stack():
            return np.stack(operands)
        case Item(_, index):
            return np.asarray(operands[0][index])
    raise AssertionError(expression)


def leaves(shape: tuple[int, ...], dtype: str) -> st.SearchStrategy[Expression]:
    stem = f"{dtype}.{'x'.join(map(str, shape))}"
    return st.sampled_from([Tensor(f"{stem}.{n}") for n in range(3)])


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> Expression:
    """A random expression that is well-formed, of up to `depth` transforms."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    found = draw(leaves(draw(st.sampled_from(SHAPES)), dtype))
    for _ in range(draw(st.integers(0, depth))):
        found = draw(transformed(found, evaluate(found, ARRAYS).shape))
    return found


@st.composite
def transformed(draw: st.DrawFn, of: Expression, shape: tuple[int, ...]) -> Expression:
    choices = ["cast", "stack", "concat", "slice", "item"] + ["transpose"] * (len(shape) > 1)
    kind = draw(st.sampled_from(choices))
    axis = draw(st.integers(0, len(shape) - 1))
    match kind:
        case "cast":
            return Cast(of, draw(st.sampled_from(["float16", "bfloat16", "float32"])))
        case "stack":
            return Stack((of,) * draw(st.integers(1, 3)))
        case "concat":
            return Concat((of,) * draw(st.integers(1, 3)), axis)
        case "transpose":
            return Transpose(of)
        case "slice":
            start = draw(st.integers(0, shape[axis] - 1))
            return Slice(of, axis, start, draw(st.integers(start + 1, shape[axis])))
    return Item(of, draw(st.integers(0, shape[0] - 1))) if len(shape) > 1 else of


def same(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


@given(expressions())
def test_it_is_what_numpy_makes_of_the_tensors(
    checkpoint: Checkpoint, expression: Expression
) -> None:
    expected = evaluate(expression, ARRAYS)
    assert expression.shape(checkpoint) == expected.shape
    assert expression.dtype(checkpoint) == expected.dtype
    same(expression.read(checkpoint), expected)


@given(expressions(), st.data())
def test_any_band_is_rows_of_the_whole(
    checkpoint: Checkpoint, expression: Expression, data: st.DataObject
) -> None:
    expected = evaluate(expression, ARRAYS)
    start = data.draw(st.integers(0, len(expected) - 1))
    stop = data.draw(st.integers(start + 1, len(expected)))
    same(expression.rows(checkpoint, start, stop), expected[start:stop])


@given(expressions(), st.integers(1, 200))
def test_a_stream_is_the_whole_in_order(
    checkpoint: Checkpoint, expression: Expression, limit: int
) -> None:
    expected = evaluate(expression, ARRAYS)
    found = list(expression.stream(checkpoint, limit))
    same(np.concatenate(found), expected)


@given(expressions(), st.integers(1, 500))
def test_bands_cover_every_row_once_and_keep_to_the_limit(
    checkpoint: Checkpoint, expression: Expression, limit: int
) -> None:
    shape = expression.shape(checkpoint)
    row = math.prod(shape[1:]) * expression.dtype(checkpoint).itemsize
    found = list(expression.bands(checkpoint, limit))
    assert [row for start, stop in found for row in range(start, stop)] == list(range(shape[0]))
    assert all((stop - start) * row <= max(limit, row) for start, stop in found)


def test_a_streamed_transposition_reads_its_operand_once(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read = Checkpoint.read_rows

    def counted(self: Checkpoint, name: str, *rest: Any) -> Any:
        reads.append(name)
        return read(self, name, *rest)

    monkeypatch.setattr(Checkpoint, "read_rows", counted)
    expression = Cast(Transpose(Tensor("BF16.4x6.0")), "float32")
    assert len(list(expression.stream(checkpoint, 8))) == 6
    assert reads == ["BF16.4x6.0"]


@given(expressions())
def test_json_gives_the_expression_back(expression: Expression) -> None:
    assert from_json(json.loads(json.dumps(expression.to_json()))) == expression


@pytest.mark.parametrize(
    "fields",
    [{}, {"tensors": "a"}, {"cast": {"tensor": "a"}}, {"stack": 3}, {"item": {"tensor": "a"}}, 7],
)
def test_other_json_is_refused(fields: Any) -> None:
    with pytest.raises(InputError, match="is not an expression"):
        from_json(fields)


@given(expressions())
def test_transposing_twice_is_nothing(checkpoint: Checkpoint, expression: Expression) -> None:
    if len(expression.shape(checkpoint)) > 1:
        twice = transpose(transpose(expression))
        assert isinstance(expression, Transpose) or twice is expression
        same(twice.read(checkpoint), evaluate(expression, ARRAYS))


@given(expressions(), st.data())
def test_an_item_is_the_entry_wherever_it_is_taken(
    checkpoint: Checkpoint, expression: Expression, data: st.DataObject
) -> None:
    stacked = data.draw(
        st.sampled_from([Stack((expression,) * 2), Transpose(Stack((expression,) * 2))])
    )
    if isinstance(stacked, Transpose) and len(expression.shape(checkpoint)) < 2:
        return
    expected = evaluate(stacked, ARRAYS)[1]
    found = item(stacked, 1)
    same(found.read(checkpoint), np.ascontiguousarray(expected))
    assert "stack" not in kinds(found) or "stack" in kinds(expression)


@given(expressions(), st.data())
def test_substitution_is_evaluation_with_other_arrays(
    checkpoint: Checkpoint, expression: Expression, data: st.DataObject
) -> None:
    known = {}
    for name in expression.tensors():
        dtype, shape, _ = name.split(".")
        sizes = tuple(map(int, shape.split("x")))
        replacement = data.draw(leaves(sizes, dtype))
        if len(sizes) == 2 and data.draw(st.booleans()):
            # The same numbers, got at in another way.
            replacement = Transpose(Transpose(replacement))
        known[name] = replacement
    values = {name: evaluate(other, ARRAYS) for name, other in known.items()}
    found = substitute(expression, known)
    same(found.read(checkpoint), evaluate(expression, values))


def test_a_tensor_nobody_knows_cannot_be_substituted() -> None:
    with pytest.raises(KeyError, match="w"):
        substitute(Transpose(Tensor("w")), {})


def test_kinds_go_from_the_tensors_outwards() -> None:
    assert kinds(Tensor("w")) == ("none",)
    assert kinds(Cast(Transpose(Concat((Tensor("v"), Tensor("w")))), "float32")) == (
        "concatenation",
        "transpose",
        "cast",
    )


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50))
def test_bfloat16_is_rounded_once_on_its_way_to_float16(bits: list[int]) -> None:
    source = np.array(bits, np.uint16).view(ml_dtypes.bfloat16)
    exact = source.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = exact.astype(np.float16)
    np.testing.assert_array_equal(cast(source, np.dtype(np.float16)), expected)
