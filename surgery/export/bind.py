"""From a graph of parameters without numbers to one whose every number is the checkpoint's."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import EDITABLE
from surgery.errors import ExportError, OnnxError, quote
from surgery.export.capture import PARAMETERS, PREFIX
from surgery.export.expressions import Cast, Expression, Tensor, bands, cast, substitute
from surgery.export.fold import Expressions
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


def refuse_overflow(bound: Expressions, checkpoint: Checkpoint) -> None:
    """Raises `OnnxError` where a finite value of a tensor does not fit float16; band by band."""
    half = np.dtype(np.float16)
    for tensor in sorted({t for expression in bound.values() for t in expression.tensors()}):
        if checkpoint.info(tensor).dtype == "F16":
            continue
        stored = Tensor(tensor)
        for rows in bands(stored, checkpoint):
            band = stored.rows(checkpoint, *rows)
            lost = np.isfinite(band) & ~np.isfinite(cast(band, half))
            if lost.any():
                worst = float(np.abs(band[lost].astype(np.float64)).max())
                raise OnnxError(
                    f"{checkpoint.root}: tensor {quote(tensor)} holds {worst:g}, which does not "
                    "fit float16 (largest 65504); export with --dtype float32"
                )


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
