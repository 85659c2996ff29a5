"""Less of everything that still shows the same: rows, positions, rows of tables, columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.repro.parts import copied

Array = NDArray[Any]
Arrays = dict[str, Array]

SMALL = 1 << 20
"""Weights of fewer bytes are left whole: a part is easier to know again."""
_COLUMNS = 16


@dataclass(frozen=True)
class Case:
    """A failing model, the nearest right one if there is one, what they are fed and what must come
    out: `value`, with `real` and `finite` positions, `limit`, `name` and `strict`."""

    failing: Any
    passing: Any | None
    inputs: Arrays
    expected: Arrays

    def models(self) -> list[Any]:
        return [model for model in (self.failing, self.passing) if model is not None]

    def changed(self, how: Callable[[Any], Any], **others: Any) -> Case:
        """With both models changed in one way."""
        passing = None if self.passing is None else how(self.passing)
        return replace(self, failing=how(self.failing), passing=passing, **others)


def shrunk(case: Case, rows: int, length: int, shows: Callable[[Case], bool]) -> Case:
    """The smallest of the cases tried that `shows` the fault; `rows` and `length` are the batch's,
    and an axis of such a size is taken for one. Whatever was taken wrongly shows nothing."""
    for steps, size in ((_rows, rows), (_lengths, length)):
        case = next(filter(shows, steps(case, size)), case)
    for step in (fewer_tokens, fewer_columns):
        if max(_weight(model) for model in case.models()) > SMALL:
            smaller = step(case)
            case = smaller if smaller is not None and shows(smaller) else case
    return case


def _weight(model: Any) -> int:
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def _rows(case: Case, rows: int) -> Iterator[Case]:
    for row in range(rows) if rows > 1 else ():
        yield _sliced(case, rows, (0,), slice(row, row + 1))


def _lengths(case: Case, length: int) -> Iterator[Case]:
    size = 1
    while size < length:
        yield _sliced(case, length, range(1, 8), slice(0, size))
        size *= 2


def _sliced(case: Case, size: int, axes: Any, part: slice) -> Case:
    def cut(array: Array) -> Array:
        wanted = [axis for axis in axes if axis < array.ndim and array.shape[axis] == size]
        return array[tuple(part if a in wanted else slice(None) for a in range(array.ndim))]

    inputs = {name: cut(array) for name, array in case.inputs.items()}
    expected = {
        n: cut(a) if n in ("value", "real", "finite") else a for n, a in case.expected.items()
    }
    return replace(case, inputs=inputs, expected=expected)


# ---------------------------------------------------------------------------------- weights


def fewer_tokens(case: Case) -> Case | None:
    """Tables of embeddings with the rows that are looked up alone, and ids to fit."""
    for name in [port.name for port in case.failing.graph.input]:
        whole = case.inputs[name].dtype.kind == "i"
        if whole and all(_looks_up(model, name) for model in case.models()):
            return _renumbered(case, name)
    return None


def _renumbered(case: Case, name: str) -> Case:
    ids = case.inputs[name]
    used, small = np.unique(ids, return_inverse=True)
    inputs = case.inputs | {name: small.reshape(ids.shape).astype(ids.dtype)}
    return case.changed(lambda model: _tables(model, name, used), inputs=inputs)


def _looks_up(model: Any, name: str) -> bool:
    """Whether all that reads an input looks rows up by it in a table of the model's own."""
    tables = {tensor.name for tensor in model.graph.initializer}
    readers = [node for node in model.graph.node if name in node.input]
    return bool(readers) and all(
        node.op_type == "Gather"
        and node.input[0] in tables
        and node.input[1] == name
        and not any(a.name == "axis" and a.i for a in node.attribute)
        for node in readers
    )


def _tables(model: Any, name: str, used: Array) -> Any:
    copy = copied(model)
    read = {node.input[0] for node in copy.graph.node if name in node.input}
    for tensor in copy.graph.initializer:
        if tensor.name in read:
            _put(tensor, _array(tensor)[used])
    return copy


def fewer_columns(case: Case) -> Case | None:
    """A product that is last with the columns alone that are furthest off."""
    value = case.expected["value"]
    worst = np.argsort(-_errors(case).reshape(-1, value.shape[-1]).max(axis=0))
    kept = np.sort(worst[:_COLUMNS])
    narrow = [narrowed(model, value.shape[-1], kept) for model in case.models()]
    if any(model is None for model in narrow):
        return None
    expected = case.expected | {"value": value[..., kept]}
    passing = narrow[1] if case.passing is not None else None
    return replace(case, failing=narrow[0], passing=passing, expected=expected)


def _errors(case: Case) -> Array:
    from surgery.repro.runs import outputs

    value = case.expected["value"]
    found = outputs(case.failing, case.inputs)[str(case.expected["name"])]
    if found.shape != value.shape:
        return np.zeros(value.shape)
    error = np.abs(found.astype(np.float64) - value)
    error[~case.expected["real"]] = 0
    return np.nan_to_num(error, nan=np.inf)


def narrowed(model: Any, width: int, kept: Array) -> Any | None:
    """The columns `kept` of a part's output alone, where a matrix makes them and what follows it
    works on each by itself; else None."""
    copy = copied(model)
    tensors = {tensor.name: tensor for tensor in copy.graph.initializer}
    maker = {name: node for node in copy.graph.node for name in node.output}
    value = copy.graph.output[0].name
    while value in maker:
        node = maker[value]
        own = [name for name in node.input if name in tensors]
        others = [name for name in node.input if name not in tensors]
        if node.op_type in ("MatMul", "Gemm"):
            return copy if _columns(node, tensors, width, kept) else None
        if node.op_type not in ("Add", "Cast", "Identity", "Mul") or len(others) != 1:
            return None
        for name in own:
            if list(tensors[name].dims[-1:]) == [width]:
                _put(tensors[name], _array(tensors[name])[..., kept])
        value = others[0]
    return None


def _columns(node: Any, tensors: dict[str, Any], width: int, kept: Array) -> bool:
    turned = any(a.name == "transB" and a.i for a in node.attribute)
    matrix = tensors.get(node.input[1])
    if matrix is None or len(matrix.dims) != 2 or matrix.dims[0 if turned else 1] != width:
        return False
    _put(matrix, np.take(_array(matrix), kept, axis=0 if turned else 1))
    for name in node.input[2:]:
        if name not in tensors:
            return False
        if list(tensors[name].dims[-1:]) == [width]:
            _put(tensors[name], _array(tensors[name])[..., kept])
    return True


def _array(tensor: Any) -> Array:
    from onnx import numpy_helper

    return np.asarray(numpy_helper.to_array(tensor))


def _put(tensor: Any, values: Array) -> None:
    from onnx import numpy_helper

    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
