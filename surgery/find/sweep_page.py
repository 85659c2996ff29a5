"""A sweep for people: its table as text and Markdown-like columns, its picture as a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from surgery.find.result import Change
from surgery.find.sweep import Point, Sweep
from surgery.report.cells import Table, make_table, number, signed
from surgery.report.html import page

LEFT, RIGHT, TOP, BOTTOM = 90.0, 1020.0, 20.0, 380.0
"""The plot's frame, in picture units."""

TICKS = 5
KNEE, ON_FRONT = "knee", "front"


@dataclass(frozen=True)
class Dot:
    """One point of the picture: where it is, what it is called and whether it is on the front."""

    x: float
    y: float
    name: str
    kind: str


@dataclass(frozen=True)
class Plot:
    """Cost to the right, the goal's change upwards; the line is the front, from no edit at all."""

    dots: tuple[Dot, ...]
    line: str
    across: tuple[tuple[float, str], ...]
    upwards: tuple[tuple[float, str], ...]


def sweep_table(sweep: Sweep) -> Table:
    """A row for each point, in the order they were asked for."""
    costs = [f"{cost.metric}, preserve" for cost in sweep.points[0].costs]
    goal = sweep.points[0].effect
    headers = ("strength", "top", goal.metric, "change", "95 % interval", *costs, "")
    rows = (
        (
            f"{point.setting.strength:g}",
            str(point.setting.top or "all"),
            number(point.effect.after),
            signed(point.effect.change),
            _between(point.effect),
            *(signed(cost.change) for cost in point.costs),
            _kind(sweep, index),
        )
        for index, point in enumerate(sweep.points)
    )
    title = f"{goal.metric} was {number(goal.before)} on {goal.count:.0f} prompts"
    return make_table(title, headers, rows, *range(len(headers) - 1))


def sweep_html(sweep: Sweep, title: str) -> str:
    """One self-contained page: no script, no network."""
    goal = sweep.points[0].effect
    return page(
        "sweep.html.j2",
        title=title,
        said=knee_words(sweep),
        found=sweep.knee is not None,
        goal=goal,
        plot=_plot(sweep),
        table=sweep_table(sweep),
        frame=(LEFT, RIGHT, TOP, BOTTOM),
    )


def knee_words(sweep: Sweep) -> str:
    """What is proposed, in a sentence."""
    if sweep.knee is None:
        return f"No setting moves {sweep.points[0].effect.metric} as wanted."
    point = sweep.points[sweep.knee]
    cost = point.costs[0]
    return (
        f"The knee is at {_name(point)}: {point.effect.metric} {signed(point.effect.change)} for "
        f"{number(cost.change)} {cost.unit} of {cost.metric}."
    )


def _plot(sweep: Sweep) -> Plot:
    drawn = [
        index
        for index in range(len(sweep.points))
        if math.isfinite(sweep.worth(index)) and math.isfinite(sweep.cost(index))
    ]
    across = _scale([sweep.cost(index) for index in drawn], LEFT, RIGHT)
    upwards = _scale([sweep.points[index].effect.change for index in drawn], BOTTOM, TOP)
    places = {
        index: (across.place(sweep.cost(index)), upwards.place(sweep.points[index].effect.change))
        for index in drawn
    }
    line = [(across.place(0.0), upwards.place(0.0)), *(places[index] for index in sweep.front)]
    dots = (
        Dot(x, y, _name(sweep.points[index]), _kind(sweep, index))
        for index, (x, y) in places.items()
    )
    spelled = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
    return Plot(tuple(dots), spelled, across.ticks, upwards.ticks)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ticks(self) -> tuple[tuple[float, str], ...]:
        values = (self.low + n * (self.high - self.low) / (TICKS - 1) for n in range(TICKS))
        return tuple((self.place(value), number(value)) for value in values)


def _scale(values: Sequence[float], start: float, end: float) -> _Scale:
    """From 0 or below to the largest value."""
    low, high = min([0.0, *values]), max([0.0, *values])
    return _Scale(low, high if high > low else low + 1.0, start, end)


def _kind(sweep: Sweep, index: int) -> str:
    if index == sweep.knee:
        return KNEE
    return ON_FRONT if index in sweep.front else ""


def _name(point: Point) -> str:
    top = f", top {point.setting.top}" if point.setting.top else ""
    return f"strength {point.setting.strength:g}{top}"


def _between(change: Change) -> str:
    nothing = math.isnan(change.low)
    return "–" if nothing else f"{signed(change.low)} … {signed(change.high)}"
