"""Where the divergences of every pair lie, as lines on one logarithmic scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

from surgery.evidence import EDGES, Divergence
from surgery.report.behaviour import pair_name
from surgery.report.cells import number
from surgery.report.model import Report

LEFT, RIGHT, TOP, STEP = 210.0, 1060.0, 14.0, 24.0
"""Where the scale begins and ends, the first line's place and the next one's, in picture units."""

SMALLEST = 1e-16
"""nats; what is below, zero included, is drawn here: float64 does not resolve it."""

MOST_TICKS = 9
WHISKER = ("1%", "10%", "median", "90%", "99%", "max")


@dataclass(frozen=True)
class Line:
    """One pair on one stimulus set: places of `WHISKER`'s percentiles and of the mean."""

    name: str
    kind: str  # "edge" or "edit"
    y: float
    x: dict[str, float]
    mean: float
    said: str


@dataclass(frozen=True)
class Plot:
    """All lines, ticks (place and text) and the policy's limit: place and extent, if it has one."""

    height: float
    lines: tuple[Line, ...]
    ticks: tuple[tuple[float, str], ...]
    limit: tuple[float, float, float] | None


def kl_plot(report: Report) -> Plot | None:
    """The picture of `report.divergence`; None where nothing in it can be drawn."""
    rows = [row for row in report.divergence if _drawable(row)]
    if not rows:
        return None
    decades = _decades([row.kl["max"] for row in rows] + [report.policy.preserve.max_kl or 0.0])
    lines = tuple(_line(number, row, decades) for number, row in enumerate(rows))
    height = TOP + STEP * len(rows)
    step = math.ceil((decades[1] - decades[0]) / MOST_TICKS)
    exponents = range(decades[0], decades[1] + 1, step)
    ticks = tuple((_place(10.0**e, decades), f"1e{e}") for e in exponents)
    return Plot(height, lines, ticks, _limit(report, lines, rows, decades))


def _drawable(row: Divergence) -> bool:
    names = ("mean", *WHISKER)
    return all(math.isfinite(row.kl.get(name, math.nan)) for name in names)


def _decades(values: list[float]) -> tuple[int, int]:
    """Powers of ten that the scale begins and ends at."""
    low = math.floor(math.log10(SMALLEST))
    high = math.ceil(math.log10(max(*values, SMALLEST)))
    return low, max(high, low + 1)


def _place(value: float, decades: tuple[int, int]) -> float:
    low, high = decades
    share = (math.log10(max(value, SMALLEST)) - low) / (high - low)
    return LEFT + share * (RIGHT - LEFT)


def _line(index: int, row: Divergence, decades: tuple[int, int]) -> Line:
    places = {name: _place(row.kl[name], decades) for name in WHISKER}
    said = (
        f"mean {number(row.kl['mean'])}, 99% {number(row.kl['99%'])}, max {number(row.kl['max'])}"
    )
    kind = "edge" if row.pair in EDGES else "edit"
    name = f"{row.stimulus_set[:12]} · {pair_name(row.pair)[:16]}"
    y = TOP + STEP * index
    return Line(name, kind, y, places, _place(row.kl["mean"], decades), said)


def _limit(
    report: Report, lines: tuple[Line, ...], rows: list[Divergence], decades: tuple[int, int]
) -> tuple[float, float, float] | None:
    """`preserve.max_kl`, across the lines of the preserve set's edits, whose means it bounds."""
    own = [
        line
        for line, row in zip(lines, rows, strict=True)
        if row.stimulus_set == "preserve" and line.kind == "edit"
    ]
    allowed = report.policy.preserve.max_kl
    if allowed is None or not own:
        return None
    return _place(allowed, decades), own[0].y - STEP / 2, own[-1].y + STEP / 2
