"""An initializer against an expression, every bit.

A tensor as it is, or transposed, is compared by `blocks`; anything else, and what is to be
diagnosed, in tiles of a few MiB. There too the tensor of a transposed initializer is read in bands
of rows, each against a stripe of the initializer's columns: neither is in memory as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import bits
from surgery.export.casting import cast, float_dtype
from surgery.export.expressions import Cast, Expression, Fold, Tensor, Transpose
from surgery.export.lineage.blocks import same, same_turned
from surgery.export.lineage.stored import Stored, stored_tensor

TILE_BYTES = 8 << 20
STRIPE_BYTES = 48 << 20
"""Of the initializer: a stripe costs a read for each row, so stripes are wide."""


@dataclass(frozen=True)
class Tile:
    """A part of an initializer that begins at (`row`, `column`): what it holds and what it should,
    as matrices of one dtype. Arrays of other than two axes are [first axis, all others]."""

    row: int
    column: int
    found: NDArray[Any]
    wanted: NDArray[Any]


def equals(stored: Stored, expression: Expression, checkpoint: Checkpoint) -> bool:
    """Whether both hold the same bits; for expressions of the initializer's shape and dtype."""
    if not stored.size:
        return True
    steps, core = _unwrap(expression)
    turned = isinstance(core, Transpose) and len(stored.shape) == 2
    of = core.of if isinstance(core, Transpose) and turned else core
    if isinstance(of, Tensor) and _is_one_cast(steps):
        return (same_turned if turned else same)(stored, stored_tensor(checkpoint, of.name))
    return all(
        np.array_equal(bits(tile.found), bits(tile.wanted))
        for tile in tiles(stored, expression, checkpoint)
    )


def _is_one_cast(steps: list[Expression]) -> bool:
    return len(steps) < 2 and not any(isinstance(step, Fold) for step in steps)


def tiles(stored: Stored, expression: Expression, checkpoint: Checkpoint) -> Iterator[Tile]:
    """An initializer and the expression for it side by side, all of both."""
    steps, core = _unwrap(expression)
    if not stored.size:
        return
    if isinstance(core, Transpose) and len(stored.shape) == 2:
        yield from _stripes(stored, steps, core.of, checkpoint)
    else:
        yield from _bands(stored, expression, checkpoint)


def _bands(stored: Stored, expression: Expression, checkpoint: Checkpoint) -> Iterator[Tile]:
    rows = stored.shape[0] if stored.shape else 1
    step = _step(stored.nbytes, rows, TILE_BYTES)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        found = stored.rows(start, stop) if stored.shape else stored.read()
        wanted = expression.rows(checkpoint, start, stop)
        yield Tile(start, 0, found.reshape(stop - start, -1), wanted.reshape(stop - start, -1))


def _stripes(
    stored: Stored, steps: list[Expression], core: Expression, checkpoint: Checkpoint
) -> Iterator[Tile]:
    columns = stored.shape[1]
    step = _step(stored.nbytes, columns, STRIPE_BYTES)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        wanted = core.rows(checkpoint, start, stop)
        for item in reversed(steps):
            wanted = _apply(item, wanted)
        yield Tile(0, start, stored.columns(start, stop), wanted.T)


def _step(nbytes: int, lines: int, tile: int) -> int:
    """How many of the lines of an array make a tile of about so many bytes."""
    return max(1, math.ceil(lines * tile / nbytes))


def _unwrap(expression: Expression) -> tuple[list[Expression], Expression]:
    """What is done to each number, outermost first, and what it is done to."""
    steps: list[Expression] = []
    while isinstance(expression, Cast | Fold):
        steps.append(expression)
        expression = expression.of
    return steps, expression


def _apply(step: Expression, values: NDArray[Any]) -> NDArray[Any]:
    if isinstance(step, Fold):
        return step.apply(values)
    return cast(values, float_dtype(step.to)) if isinstance(step, Cast) else values
