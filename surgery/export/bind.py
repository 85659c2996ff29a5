"""From a graph of parameters without numbers to one whose every number is the checkpoint's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import EDITABLE
from surgery.errors import ExportError, OnnxError, quote
from surgery.export.capture import PARAMETERS, PREFIX
from surgery.export.casting import cast
from surgery.export.expressions import Cast, Expression, Expressions, Tensor, substitute
from surgery.export.parameters import source, sources


def bind(model: Any, expressions: Expressions, checkpoint: Checkpoint) -> Expressions:
    """Every initializer of `expressions` as an expression in tensors of `checkpoint`, in the
    dtype the graph computes in. Reads headers alone, but for tensors that the config ties.

    Raises `ExportError` when a parameter has no tensor or one of another shape, or when tensors
    the model ties differ on disk.
    """
    known = sources(identify(checkpoint), model.metadata_props[PREFIX])
    names: dict[str, list[str]] = json.loads(model.metadata_props[PARAMETERS])
    used = {name for expression in expressions.values() for name in expression.tensors()}
    made = {name: source(names[name], known, checkpoint) for name in sorted(used)}
    bound = {}
    for name, expression in expressions.items():
        value = model.graph.initializers[name]
        found = substitute(expression, made)
        _check(checkpoint, found, name, tuple(value.shape.numpy()))
        bound[name] = _computed(found, str(value.dtype.numpy()), checkpoint)
    return bound


def unused(checkpoint: Checkpoint, bound: Expressions) -> tuple[str, ...]:
    """The checkpoint tensors that no initializer is made of."""
    used = {tensor for expression in bound.values() for tensor in expression.tensors()}
    return tuple(sorted(set(checkpoint.tensors) - used))


def numbers(expression: Expression, checkpoint: Checkpoint) -> Iterator[NDArray[Any]]:
    """The bands of a bound expression, as `Expression.stream` gives them.

    Raises `OnnxError` where a finite value does not fit the float16 it is cast to.
    """
    if not (isinstance(expression, Cast) and expression.to == "float16"):
        yield from expression.stream(checkpoint)
        return
    for band in expression.of.stream(checkpoint):
        yield _halved(band, expression, checkpoint)


def refuse_overflow(bound: Expressions, checkpoint: Checkpoint) -> None:
    """Raises `OnnxError` where a finite value of a tensor does not fit float16; band by band."""
    for name in sorted({t for expression in bound.values() for t in expression.tensors()}):
        if checkpoint.info(name).dtype != "F16":
            for _ in numbers(Cast(Tensor(name), "float16"), checkpoint):
                pass


def refuse_infinite_constants(model: Any, bound: Expressions, checkpoint: Checkpoint) -> None:
    """Raises `OnnxError` where a number of the graph's own, a limit or a mask, has become infinite
    in float16; masks that transformers makes for float16 are finite there."""
    for name in sorted(set(model.graph.initializers) - set(bound)):
        constant = model.graph.initializers[name].const_value
        if constant.dtype.name == "FLOAT16" and np.isinf(constant.numpy()).any():
            raise OnnxError(
                f"{checkpoint.root}: the graph has a constant {quote(name)} that does not fit "
                "float16 (largest 65504); export with --dtype float32"
            )


def _halved(band: NDArray[Any], expression: Expression, checkpoint: Checkpoint) -> NDArray[Any]:
    half = cast(band, np.dtype(np.float16))
    lost = np.isinf(half) & np.isfinite(band)
    if lost.any():
        worst = float(np.abs(band[lost].astype(np.float64)).max())
        tensors = ", ".join(map(quote, expression.tensors()))
        raise OnnxError(
            f"{checkpoint.root}: tensor {tensors} holds {worst:g}, which does not fit float16 "
            "(largest 65504); export with --dtype float32"
        )
    return half


def _check(
    checkpoint: Checkpoint, expression: Expression, name: str, expected: tuple[int, ...]
) -> None:
    shape = expression.shape(checkpoint)
    stored = {checkpoint.info(tensor).dtype for tensor in expression.tensors()}
    if shape != expected or not stored <= set(EDITABLE):
        tensors = ", ".join(map(quote, expression.tensors()))
        raise ExportError(
            f"{checkpoint.root}: {tensors} gives {'/'.join(sorted(stored))} {list(shape)} for "
            f"{quote(name)}; the graph expects a float tensor {list(expected)}"
        )


def _computed(expression: Expression, dtype: str, checkpoint: Checkpoint) -> Expression:
    stored = {checkpoint.info(tensor).dtype for tensor in expression.tensors()}
    same = {"float32": {"F32"}, "float16": {"F16"}, "float64": {"F64"}}[dtype]
    return expression if stored == same else Cast(expression, dtype)
