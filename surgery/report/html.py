"""One self-contained page: no script, no network, light and dark, fit to print."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from surgery.evidence import CORNERS, EDGES, Effect
from surgery.report.cells import number, signed
from surgery.report.klplot import kl_plot
from surgery.report.model import CornerName, Report
from surgery.report.tables import HEADLINES, change, headline, subline, tables
from surgery.syntax import printable

TEMPLATES = Path(__file__).parent

PLACES: dict[CornerName, tuple[int, int]] = {
    "T_o": (150, 70),
    "T_e": (570, 70),
    "R_o": (150, 330),
    "R_e": (570, 330),
}
"""Centres of the boxes in the picture's own units (720 x 400)."""

TITLES = {
    "T_o": "original, PyTorch",
    "T_e": "edited, PyTorch",
    "R_o": "original, ONNX",
    "R_e": "edited, ONNX",
}


@dataclass(frozen=True)
class Box:
    """A corner of the picture; state is `pass`, `fail` or `absent`."""

    name: str
    title: str
    x: int
    y: int
    state: str
    status: str


@dataclass(frozen=True)
class Edge:
    """A line of the picture: what it says, and whether its findings are none."""

    name: str
    state: str
    value: str


@dataclass(frozen=True)
class Bar:
    """One corner's value in a chart; start and length in percent of the chart's width."""

    corner: str
    shown: str
    start: float
    length: float


@dataclass(frozen=True)
class Chart:
    """One metric before and after the edit, in both runtimes."""

    effect: Effect
    bars: tuple[Bar, ...]
    zero: float
    change_torch: str
    change_onnx: str


def page(template: str, **values: Any) -> str:
    """A page of one of the templates here: escaped, and every value made printable."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_final,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


class Html:
    """Autoescaped; what is printed is also made printable, whatever the template does."""

    def render(self, report: Report) -> str:
        return page(
            "page.html.j2",
            report=report,
            word=HEADLINES[report.verdict],
            headline=headline(report),
            subline=subline(report),
            boxes=[_box(report, name) for name in PLACES],
            conversions=[_conversion(report, name) for name in EDGES],
            edit=_edit(report),
            converted_edit=_edit_state(report, "R"),
            interaction=_interaction(report),
            charts=[_chart(effect) for effect in report.effects],
            plot=kl_plot(report),
            tables=tables(report),
        )


def _final(value: Any) -> Any:
    return printable(value, 1000) if isinstance(value, str) and type(value) is not Markup else value


def _box(report: Report, name: CornerName) -> Box:
    corner = report.corners.get(name)
    x, y = PLACES[name]
    if corner is None:
        return Box(name, TITLES[name], x, y, "absent", "not run")
    state = "fail" if corner.status != "ok" or _blamed(report, name) else "pass"
    return Box(name, TITLES[name], x, y, state, corner.status)


def _blamed(report: Report, site: str) -> bool:
    """Whether a finding is about a corner or an edge."""
    return any(finding.site.split("/")[0] == site for finding in report.findings)


def _conversion(report: Report, edge: str) -> Edge:
    """The edge with its worst ratio over all outputs; NaN is worse than any number."""
    rows = [c for c in report.conversion if c.edge == edge]
    ratios = [r for c in rows for r in (c.ratio_max, c.ratio_l2, c.ratio_position)]
    if not ratios:
        return Edge(edge, "absent", "not measured")
    worst = math.nan if any(map(math.isnan, ratios)) else max(ratios)
    failed = _blamed(report, edge) or _blamed(report, EDGES[edge][1])
    return Edge(edge, "fail" if failed else "pass", f"{number(worst)}× noise")


def _edit(report: Report) -> Edge:
    """E, as large as on the stimulus set where it is largest."""
    effects = [row.effect for row in report.interaction]
    if not effects:
        return Edge("E", "absent", "not measured")
    return Edge("E", _edit_state(report, "T"), f"‖E‖ = {number(max(effects))}")


def _edit_state(report: Report, runtime: str) -> str:
    """Whether behaviour in one runtime is what the policy asks for."""
    if not report.interaction:
        return "absent"
    names = {runtime, f"{runtime}_o", f"{runtime}_e"}
    sites = [f.site for f in report.findings if f.stage in ("target", "preserve")]
    return "fail" if any(names & set(site.split("/")) for site in sites) else "pass"


def _interaction(report: Report) -> list[tuple[str, str, str]]:
    """(stimulus set, what is measured there, state) of the first three rows."""
    failed = {f.site for f in report.findings if f.stage == "interaction"}
    lines = []
    for row in report.interaction[:3]:
        state = "fail" if f"{row.stimulus_set}/{row.output}" in failed else "pass"
        text = f"‖I‖/‖E‖ = {number(row.ratio)}, ρ = {signed(row.rho)}"
        if row.effect <= report.policy.interaction.max_noise_ratio * row.noise:
            text = f"‖I‖ = {number(row.noise_ratio)}× noise, E is noise"
        lines.append((row.stimulus_set, text, state))
    return lines


def _chart(effect: Effect) -> Chart:
    """Bars from zero, on a common scale: that of shares ends at 1, others at the largest value."""
    finite = [value for value in effect.corners.values() if math.isfinite(value)]
    if effect.unit.startswith("share"):
        finite.append(1.0)
    low, high = min([0.0, *finite]), max([0.0, *finite])
    scale = 100 / (high - low) if high > low else 0.0
    zero = -low * scale
    bars = tuple(
        _bar(name, effect.corners[name], zero, scale) for name in CORNERS if name in effect.corners
    )
    return Chart(effect, bars, zero, change(effect, "T"), change(effect, "R"))


def _bar(name: str, value: float, zero: float, scale: float) -> Bar:
    length = value * scale if math.isfinite(value) else 0.0
    start = zero + min(length, 0.0)
    return Bar(name, number(value), start, abs(length))
