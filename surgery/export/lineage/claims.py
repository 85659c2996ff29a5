"""`lineage.json`: what an exporter says its initializers are. A claim, never a proof."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.files import parse_json_object, read_small
from surgery.errors import CheckpointError, InputError, OnnxError, quote
from surgery.export.expressions import Concat, Expression, Fold, Item, Slice, Stack, from_json
from surgery.export.lineage.quantised import Quantise
from surgery.export.lineage.result import PROVEN, Lineage, Row

CLAIMS = "lineage.json"
_MAX_DEPTH = 16
_MAX_PARTS = 100_000


def render(
    onnx: str, model: str, expressions: Mapping[str, Expression], unused: Mapping[str, str]
) -> str:
    """`lineage.json` of a graph whose initializers are these expressions, as its exporter knows."""
    rows = [Row.of(name, PROVEN, expression) for name, expression in expressions.items()]
    claim = Lineage(onnx, model, tuple(rows), unused)
    return json.dumps(claim.to_json(), indent=1, ensure_ascii=True) + "\n"


def read_claims(onnx: Path, checkpoint: Checkpoint) -> dict[str, Expression]:
    """Initializer to what `lineage.json` beside the graph says it is; empty without that file.

    Raises `OnnxError` for a file that is not of that form, or that speaks of tensors or indices
    that there are not.
    """
    path = onnx.with_name(CLAIMS)
    if not path.is_symlink() and not path.exists():
        return {}
    try:
        document = parse_json_object(read_small(path), str(path))
        return dict(_claim(entry, checkpoint) for entry in _entries(document))
    except CheckpointError as error:
        raise OnnxError(str(error)) from None
    except InputError as error:
        raise OnnxError(f"{path}: {error}") from None


def _entries(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    entries = document.get("initializers")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError("initializers: expected a list of objects")
    names = [entry.get("name") for entry in entries]
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise InputError("initializers: expected a name for each, and each once")
    made = [entry for entry in entries if isinstance(entry.get("expression"), dict)]
    # Weights in 8 bits are known by their names and schemes; a claim would add nothing.
    return [entry for entry in made if Quantise.kind not in entry["expression"]]


def _claim(entry: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[str, Expression]:
    name = str(entry["name"])
    try:
        expression = from_json(entry["expression"])
        check_expression(expression, checkpoint)
    except InputError as error:
        raise InputError(f"initializer {quote(name)}: {error}") from None
    return name, expression


def check_expression(expression: Expression, checkpoint: Checkpoint) -> tuple[int, ...]:
    """The shape of an expression somebody else wrote; raises `InputError` unless every tensor,
    axis and index in it is real and no part of it is larger than the checkpoint."""
    limit = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    return _check(expression, checkpoint, limit, _MAX_DEPTH)


def _check(
    expression: Expression, checkpoint: Checkpoint, limit: int, depth: int
) -> tuple[int, ...]:
    if depth == 0:
        raise InputError(f"the expression is nested deeper than {_MAX_DEPTH}")
    operands = expression.operands()
    if len(operands) > _MAX_PARTS:
        raise InputError(f"the expression has more than {_MAX_PARTS} parts")
    shapes = [_check(operand, checkpoint, limit, depth - 1) for operand in operands]
    _check_kind(expression, shapes)
    shape = expression.shape(checkpoint)
    expression.dtype(checkpoint)
    if math.prod(shape) > limit:
        raise InputError("the expression is larger than the checkpoint")
    return shape


def _check_kind(expression: Expression, shapes: list[tuple[int, ...]]) -> None:
    if isinstance(expression, Slice):
        _check_slice(expression, shapes[0])
    elif isinstance(expression, Concat):
        axis = expression.axis
        rest = {(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}
        if len(rest) != 1 or not all(0 <= axis < len(shape) for shape in shapes):
            raise InputError(f"parts {shapes} do not fit together along axis {axis}")
    elif isinstance(expression, Item):
        if not shapes[0] or not 0 <= expression.index < shapes[0][0]:
            raise InputError(f"entry {expression.index} is not in a tensor {list(shapes[0])}")
    elif isinstance(expression, Stack) and len(set(shapes)) != 1:
        raise InputError(f"parts of a stack must have one shape; found {shapes}")
    elif isinstance(expression, Fold):
        numbers = (expression.factor, expression.offset)
        if not all(map(math.isfinite, numbers)):
            raise InputError("a folded constant must be finite")


def _check_slice(cut: Slice, shape: tuple[int, ...]) -> None:
    if not 0 <= cut.axis < len(shape) or not 0 <= cut.start < cut.stop <= shape[cut.axis]:
        raise InputError(
            f"a slice {cut.start}:{cut.stop} of axis {cut.axis} is not in a tensor {list(shape)}"
        )
