"""Cells and tables of short strings: what every table of a report is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from surgery.syntax import printable

ABSENT = "–"


@dataclass(frozen=True)
class Table:
    """Rows of cells; `numeric` holds the columns to align right.

    Where there is no room, `spare` headers go first, in this order; `names` headers are over cells
    that are never broken within a word.
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    spare: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()


def number(value: float | None) -> str:
    """Three digits, or the whole part in full; `–` for what was not measured."""
    if value is None:
        return ABSENT
    if not abs(value) < math.inf:
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if isinstance(value, int):
        return f"{value:,}"
    if 1e3 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


def changed(share: float) -> str:
    """A change that is a share of what it changes: `+9.50%`."""
    return ("+" if share > 0 else "") + percent(share)


def percent(share: float) -> str:
    return f"{share:.2%}" if math.isfinite(share) else number(share)


def make_table(
    title: str,
    headers: tuple[str, ...],
    rows: Iterable[Iterable[str]],
    *numeric: int,
    spare: tuple[str, ...] = (),
    names: tuple[str, ...] = (),
) -> Table:
    """A table of printable cells; `numeric` are the columns to align right."""
    shown = tuple(tuple(printable(cell, 600) for cell in row) for row in rows)
    return Table(title, headers, shown, frozenset(numeric), spare, frozenset(names))
