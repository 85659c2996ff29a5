"""What is wrong with an initializer that should hold an expression and does not.

One pass over both gathers where they differ and which simple explanations still hold.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import bits
from surgery.export.casting import cast
from surgery.export.expressions import Expression, Transpose
from surgery.export.lineage.comparing import Tile, tiles
from surgery.export.lineage.stored import Stored

STALE = "stale tensor"
SWAPPED = "swapped"
WRONG = "wrong tensor"
TRANSPOSED = "transposed"
SCALED = "scaled"
TRUNCATED = "truncated"
ROUNDED = "rounded"
SHIFTED = "shifted"
DTYPE = "dtype"
SHAPE = "shape"
ELEMENT = "element"
ROW = "row"
COLUMN = "column"
QUANTISED = "quantised"
MISSING = "missing tensor"
CLAIM = "false claim"
SYMPTOMS = (
    STALE, SWAPPED, WRONG, TRANSPOSED, SCALED, TRUNCATED, ROUNDED, SHIFTED, DTYPE, SHAPE, ELEMENT,
    ROW, COLUMN, QUANTISED, MISSING, CLAIM,
)  # fmt: skip
"""Every word a finding of lineage can have as its symptom; they stay as they are."""

_NARROW = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
_SHIFTS = tuple(range(1, 17))
_PREFIX = 4096
_SCALE_TOLERANCE = 1e-3


def diagnose(stored: Stored, expression: Expression, checkpoint: Checkpoint) -> tuple[str, str]:
    """A symptom and what to say of it, for an expression of the initializer's shape and dtype
    from which it differs."""
    found = _Difference(stored, expression, checkpoint)
    return found.described() or _shift(stored, expression, checkpoint) or (STALE, found.extent())


class _Difference:
    """Where two arrays differ, gathered tile by tile."""

    def __init__(self, stored: Stored, expression: Expression, checkpoint: Checkpoint) -> None:
        self._shape = stored.shape
        self._turned = len(stored.shape) == 2 and is_turned(expression)
        rows = stored.shape[0] if stored.shape else 1
        self._width = stored.size // rows
        self._rows, self._columns = np.zeros(rows, bool), np.zeros(self._width, bool)
        self._count, self._here, self._turn = 0, _Order(self._width), _Order(rows)
        self._one: tuple[Any, Any] | None = None
        self._narrow = dict(_NARROW)
        self._ratio = _Ratio()
        for tile in tiles(stored, expression, checkpoint):
            self._add(tile)

    def _add(self, tile: Tile) -> None:
        wanted, found = np.ascontiguousarray(tile.wanted), np.ascontiguousarray(tile.found)
        for name in list(self._narrow):
            rounded = cast(cast(wanted, self._narrow[name]), found.dtype)
            if not np.array_equal(bits(rounded), bits(found)):
                del self._narrow[name]
        self._ratio.add(wanted, found)
        differs, nonzero = bits(found) != bits(wanted), bits(found) != 0
        self._here.add(differs, nonzero, tile.row, tile.column)
        self._turn.add(differs.T, nonzero.T, tile.column, tile.row)
        if differs.any():
            self._mark(differs, tile)
            place = np.unravel_index(int(np.argmax(differs)), differs.shape)
            self._one = found[place], wanted[place]

    def _mark(self, differs: NDArray[np.bool_], tile: Tile) -> None:
        height, width = differs.shape
        self._rows[tile.row : tile.row + height] |= differs.any(axis=1)
        self._columns[tile.column : tile.column + width] |= differs.any(axis=0)
        self._count += int(np.count_nonzero(differs))

    def described(self) -> tuple[str, str] | None:
        """The simplest explanation; None where there is none."""
        rows, columns = np.flatnonzero(self._rows), np.flatnonzero(self._columns)
        if self._count == 1 and self._one is not None:
            return ELEMENT, f"{self._at(self._here.first)} is {_number(*self._one)}"
        if self._here.is_cut:
            return TRUNCATED, f"it holds zeros from element {self._here.first} on"
        if self._turned and self._turn.is_cut:
            return TRUNCATED, f"it holds zeros from element {self._turn.first} of the tensor on"
        if len(self._shape) > 1 and len(rows) == 1:
            return self._line(0, int(rows[0]))
        if len(self._shape) == 2 and len(columns) == 1:
            return self._line(1, int(columns[0]))
        if self._narrow:
            return ROUNDED, f"it was rounded to {next(iter(self._narrow))} on the way"
        factor = self._ratio.factor()
        return None if factor is None else (SCALED, f"it is scaled by about {factor:.6g}")

    def extent(self) -> str:
        total, first = self._width * len(self._rows), self._at(self._here.first)
        return f"{self._count} of {total} elements differ, the first at {first}"

    def _line(self, axis: int, index: int) -> tuple[str, str]:
        """One row or column of the tensor as the checkpoint has it."""
        symptom = (ROW, COLUMN)[axis ^ self._turned]
        here = f" ({(ROW, COLUMN)[axis]} {index} of the initializer)" if self._turned else ""
        return symptom, f"{symptom} {index} of the tensor{here} differs in {self._count} elements"

    def _at(self, flat: int) -> str:
        index = [int(i) for i in np.unravel_index(flat, self._shape)]
        where = index[::-1] if self._turned else index
        return f"element {where}"


class _Order:
    """The first element that differs and the last that is not zero, of an array that is flattened
    with `width` elements to a line."""

    def __init__(self, width: int) -> None:
        self._width = width
        self.first, self._last = sys.maxsize, -1

    def add(
        self, differs: NDArray[np.bool_], nonzero: NDArray[np.bool_], row: int, column: int
    ) -> None:
        """Counts in a tile that begins at (`row`, `column`)."""
        if differs.any():
            here = int(np.argmax(differs.any(axis=1)))
            there = int(np.argmax(differs[here]))
            self.first = min(self.first, (row + here) * self._width + column + there)
        if nonzero.any():
            here = int(np.flatnonzero(nonzero.any(axis=1))[-1])
            there = int(np.flatnonzero(nonzero[here])[-1])
            self._last = max(self._last, (row + here) * self._width + column + there)

    @property
    def is_cut(self) -> bool:
        """Whether there is nothing but zeros from the first difference on."""
        return self._last < self.first


class _Ratio:
    """Whether all of one array is the same multiple of another: least squares, in one pass."""

    def __init__(self) -> None:
        self._xx = self._xy = self._yy = 0.0

    def add(self, wanted: NDArray[Any], found: NDArray[Any]) -> None:
        with np.errstate(all="ignore"):
            x, y = (side.astype(np.float64) for side in (wanted, found))
            self._xx += float((x * x).sum())
            self._xy += float((x * y).sum())
            self._yy += float((y * y).sum())

    def factor(self) -> float | None:
        if not (0 < self._xx < np.inf and 0 < self._yy < np.inf):
            return None
        factor = self._xy / self._xx
        residual = max(self._yy - factor * self._xy, 0.0)
        return factor if residual <= (_SCALE_TOLERANCE**2) * self._yy else None


@dataclass(frozen=True)
class _Prefix:
    """The first elements of an initializer and of the expression for it, flattened."""

    found: NDArray[Any]
    wanted: NDArray[Any]


def _shift(
    stored: Stored, expression: Expression, checkpoint: Checkpoint
) -> tuple[str, str] | None:
    """The flattened initializer is the expression's, some elements off."""
    prefix = _prefix(stored, expression, checkpoint)
    found, wanted = bits(prefix.found), bits(prefix.wanted)
    for by in _SHIFTS:
        if by + 8 > len(found) or not np.any(found[0] != found):
            break
        if np.array_equal(found[:-by], wanted[by:]):
            return SHIFTED, f"its data begins {by} elements late: element 0 is element {by}"
        if np.array_equal(found[by:], wanted[:-by]):
            return SHIFTED, f"its data begins {by} elements early: element {by} is element 0"
    return None


def _prefix(stored: Stored, expression: Expression, checkpoint: Checkpoint) -> _Prefix:
    width = stored.size // stored.shape[0] if stored.shape else 1
    rows = min(stored.shape[0] if stored.shape else 0, max(1, _PREFIX // max(width, 1)))
    found, wanted = stored.rows(0, rows), expression.rows(checkpoint, 0, rows)
    return _Prefix(*(np.ascontiguousarray(side).reshape(-1)[:_PREFIX] for side in (found, wanted)))


def is_turned(expression: Expression) -> bool:
    """Whether an expression is a transposed one, under casts and folded constants."""
    while not isinstance(expression, Transpose):
        operands = expression.operands()
        if len(operands) != 1:
            return False
        expression = operands[0]
    return True


def _number(found: Any, wanted: Any) -> str:
    if float(found) == -float(wanted):
        return f"{float(found):.9g}, expected {float(wanted):.9g}: its sign differs"
    return f"{float(found):.9g}, expected {float(wanted):.9g}"
