"""Tables for a terminal or a log."""

from __future__ import annotations

import io
import os
from typing import IO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text as RichText

from surgery.report.model import Report
from surgery.report.tables import Table, headline, subline, tables

BACKGROUND = ("Corners", "Policy", "Inputs", "Environment")
STYLES = {"pass": "bold green", "fail": "bold red", "not_evaluated": "bold yellow"}


def wants_color(stream: IO[str]) -> bool:
    """Whether `stream` is a terminal of someone who did not ask for `NO_COLOR`."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


class Text:
    """Plain text, or with ANSI colours when asked; `width` in columns.

    `brief` leaves out what only a later reader needs: inputs, policy, environment.
    """

    def __init__(self, color: bool = False, width: int = 120, brief: bool = False) -> None:
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
            console.print(_table(table))
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _table(table: Table) -> RichTable:
    """Cells are `rich.text.Text`, in which brackets are no markup."""
    made = RichTable(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column, header in enumerate(table.headers):
        right = column in table.numeric
        made.add_column(
            RichText(header),
            justify="right" if right else "left",
            # Names and numbers are read whole; only the last columns may wrap.
            no_wrap=right or column == 0,
            overflow="fold",
        )
    for row in table.rows:
        made.add_row(*map(RichText, row))
    return made
