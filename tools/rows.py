"""Rows of a benchmark's table: figures measured in turn, against their limits, as Markdown."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from measuring import Failed, Run

B = TypeVar("B")
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One line of the table; `holds` is None where the figure has no limit."""

    figure: str
    limit: str
    measured: str
    holds: bool | None
    detail: str

    def __str__(self) -> str:
        mark = {True: "yes", False: "**no**", None: "–"}[self.holds]
        return f"| {self.figure} | {self.limit} | {self.measured} | {mark} | {self.detail} |"


def interleave(runs: int, measures: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """What each measure gives, in turn, the order reversed every other round."""
    found: dict[str, list[T]] = {name: [] for name in measures}
    for number in range(runs):
        for name in list(measures)[:: -1 if number % 2 else 1]:
            found[name].append(measures[name]())
    return found


def compare(
    figure: str, limit: float, runs: Mapping[str, Sequence[Run]], ours: str, other: str
) -> Row:
    """The ratio of the medians of the seconds of `ours` and `other`."""
    seconds = {name: [run.seconds for run in runs[name]] for name in (ours, other)}
    ratio = statistics.median(seconds[ours]) / statistics.median(seconds[other])
    detail = "; ".join(f"{name} {spread(found)}" for name, found in seconds.items())
    return Row(figure, f"≤ {limit:g} ×", f"{ratio:.2f} ×", ratio <= limit, detail)


def spread(seconds: Sequence[float]) -> str:
    median = statistics.median(seconds)
    return f"{median:.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def surgery(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "surgery", *map(str, arguments)]


def offers(command: str, option: str = "") -> bool:
    """Whether this version of `surgery` has the command, with the option."""
    done = subprocess.run(surgery(command, "--help"), capture_output=True, check=False)
    return done.returncode == 0 and option.encode() in done.stdout


def table(
    bench: B,
    rows: Mapping[str, Callable[[B], list[Row]]],
    names: Iterable[str],
    after: Callable[[], None],
) -> int:
    """Prints the named rows as they are measured, `after` run after each; 1 where one fails."""
    print("| figure | limit | measured | holds | detail |\n|---|---|---|---|---|", flush=True)
    failed = False
    for name in names:
        for row in _attempt(rows[name], bench, name):
            print(row, flush=True)
            failed |= row.holds is False
        after()
    return int(failed)


def _attempt(measure: Callable[[B], list[Row]], bench: B, name: str) -> list[Row]:
    """The rows of that name; a command that fails is a row that does not hold, not the end."""
    try:
        return measure(bench)
    except Failed as failure:
        return [Row(name, "", "failed", False, ascii(str(failure)))]
