"""An initializer against an expression, every bit, in tiles of a few MiB.

The tensor of a transposed initializer is read in bands of rows all the same, each against a stripe
of the initializer's columns: neither is ever in memory as a whole.
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
from surgery.export.expressions import Cast, Expression, Fold, Transpose, cast, float_dtype
from surgery.export.lineage.stored import Stored

TILE_BYTES = 8 << 20
STRIPE_BYTES = 48 << 20
"""Of the initializer: a stripe costs a read for each row, so stripes are wide."""

_ROWS, _COLUMNS = 256, 64


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
    return all(_same(tile) for tile in tiles(stored, expression, checkpoint))


def _same(tile: Tile) -> bool:
    found, wanted = bits(tile.found), bits(tile.wanted)
    if found.flags.c_contiguous and wanted.flags.c_contiguous:
        return bool(np.array_equal(found, wanted))
    # One of them is transposed: small blocks keep both in the cache.
    height, width = found.shape
    return all(
        np.array_equal(
            found[row : row + _ROWS, at : at + _COLUMNS],
            wanted[row : row + _ROWS, at : at + _COLUMNS],
        )
        for row in range(0, height, _ROWS)
        for at in range(0, width, _COLUMNS)
    )


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
