"""Progress on stderr, where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Gives a callback that names what runs now: a spinner with the time it has taken.

    Nothing at all is shown where stderr is no terminal.
    """
    with staged_bar() as (stage, _):
        yield stage


@contextmanager
def staged_bar() -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int], None]]]:
    """As `stages`, and a second callback (item, done, total) that draws a bar of the stage."""
    if not sys.stderr.isatty():
        yield lambda stage: None, lambda item, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)
        yield (
            lambda stage: progress.update(task, description=stage, completed=0, total=None),
            lambda item, done, total: progress.update(task, completed=done, total=total),
        )


@contextmanager
def rows_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Gives a callback (stage, done, total) that draws the bar of whatever stage runs."""
    with staged_bar() as (name, draw):

        def show(stage: str, done: int, total: int) -> None:
            name(stage)
            draw(stage, done, total)

        yield show


@contextmanager
def bar(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """Gives a callback (item, done, total) that draws a bar on a terminal's stderr."""
    if not sys.stderr.isatty():
        yield lambda item, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda item, done, total: progress.update(task, completed=done, total=total)
