"""What commands print and write."""

from __future__ import annotations

import os
import sys
from json import dumps
from pathlib import Path
from typing import Any

import click


def terminal_text(report: Any, brief: bool = False) -> str:
    """A report for stdout, as wide as the terminal and with colours if that is wanted."""
    from surgery.report.text import Text, wanted_width, wants_color

    color, width = wants_color(sys.stdout), wanted_width(sys.stdout)
    return Text(color=color, width=width, brief=brief).render(report)


def finish(report: Any, tail: str = "") -> None:
    """Prints a report and leaves with its verdict's exit code."""
    from surgery.gate import EXIT_CODES

    click.echo(terminal_text(report, brief=True), nl=False)
    if tail:
        click.echo(tail)
    sys.exit(EXIT_CODES[report.verdict])


def echo_json(value: Any) -> None:
    click.echo(json_text(value), nl=False)


def json_text(value: Any) -> str:
    """`value` as JSON, with a line's end; numbers that are none are strings."""
    from surgery.report.model import plain

    return dumps(plain(value), indent=2, default=str, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.staging")
    try:
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
