"""Tables for a terminal or a log."""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import dataclass
from typing import IO, Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text as RichText

from surgery.report.behaviour import TITLES
from surgery.report.cells import Table
from surgery.report.model import Report
from surgery.report.noise_tables import FIXED, PASSES_AT, SHAPE
from surgery.report.tables import headline, subline, tables

BACKGROUND = (*TITLES, SHAPE, PASSES_AT, FIXED, "Corners", "Policy", "Inputs", "Environment")
NARROW, WIDE, WIDTH = 80, 160, 120
GAP = 3
"""Columns between two cells."""

WORD = 24
"""Longest word that is kept whole where a table is too wide; names always are."""

STYLES = {"pass": "bold green", "fail": "bold red", "not_evaluated": "bold yellow"}


def wants_color(stream: IO[str]) -> bool:
    """Whether `stream` is a terminal of someone who did not ask for `NO_COLOR`."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def wanted_width(stream: IO[str]) -> int:
    """That of the terminal within reason, or what COLUMNS asks for; else `WIDTH`."""
    if not (stream.isatty() or os.environ.get("COLUMNS")):
        return WIDTH
    return min(max(shutil.get_terminal_size((WIDTH, 24)).columns, NARROW), WIDE)


class Text:
    """Plain text, or with ANSI colours when asked; `width` in columns.

    A table that is too wide first loses its spare columns; a line longer than `width` is the last
    resort, for names and numbers are read whole.

    `brief` leaves out what only a later reader needs: statistics, inputs, policy, environment.
    """

    def __init__(self, color: bool = False, width: int = WIDTH, brief: bool = False) -> None:
        self.color = color
        self.width = width
        self.brief = brief

    def render(self, report: Report) -> str:
        out = io.StringIO()
        # Nothing is left to rich's guesses: the text must not depend on the environment.
        console = Console(
            file=out,
            width=self.width,
            color_system="standard" if self.color else None,
            force_terminal=self.color,
            no_color=not self.color,
            legacy_windows=False,
            highlight=False,
            _environ={},
        )
        console.print(RichText(headline(report), style=STYLES[report.verdict]))
        console.print(RichText(subline(report)))
        for table in tables(report):
            if self.brief and table.title in BACKGROUND:
                continue
            console.print()
            console.print(RichText(table.title, style="bold"))
            columns = _fitting(table, self.width)
            widths = [column.width for column in columns]
            console.width = max(self.width, sum(widths) + GAP * (len(widths) - 1))
            console.print(_table(columns))
            console.width = self.width
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


@dataclass
class _Column:
    """One column: its cells, the least it can be shown in, and the width it gets."""

    header: str
    cells: tuple[str, ...]
    numeric: bool
    least: int
    width: int


def _fitting(table: Table, width: int) -> list[_Column]:
    """The columns that fit in `width`, the widest of them made narrower where they must be."""
    columns = [_column(table, index) for index in range(len(table.headers))]
    room = width + GAP
    for header in table.spare:
        if sum(column.least + GAP for column in columns) > room:
            columns = [column for column in columns if column.header != header]
    while sum(column.width + GAP for column in columns) > room:
        widest = max(columns, key=lambda column: (column.width > column.least) * column.width)
        if widest.width <= widest.least:
            break
        widest.width -= 1
    return columns


def _column(table: Table, index: int) -> _Column:
    """Numbers and the first column are never broken; of others, words are not."""
    header, cells = table.headers[index], tuple(row[index] for row in table.rows)
    whole = max(map(cell_len, (header, *cells)))
    words = [cell_len(word) for cell in (header, *cells) for word in cell.split()]
    numeric, longest = index in table.numeric, max(words, default=1)
    least = longest if header in table.names else min(longest, WORD)
    return _Column(header, cells, numeric, whole if numeric or index == 0 else least, whole)


def _table(columns: list[_Column]) -> RichTable:
    """Cells are `rich.text.Text`, in which brackets are no markup."""
    made = RichTable(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.numeric else "left"
        header = RichText(column.header)
        made.add_column(header, justify=justify, width=column.width, overflow="fold")
    for row in zip(*(column.cells for column in columns), strict=True):
        made.add_row(*map(RichText, row))
    return made
