"""Tables about noise: how errors are distributed, what tolerance would pass, and A/A runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from surgery.evidence import ErrorShape, Repeat, Tolerance
from surgery.presets import PRESETS
from surgery.report.cells import Table, make_table, number, signed

PRESENT = "present."
"""Caches begin so: a report shows the worst, and the evidence holds them all."""

SHAPE, PASSES_AT, FIXED = "Error in units of noise", "Passes at", "Fixed tolerances"
"""Titles; of the tables for whoever wants to know more than the verdict."""


def noise_tables(
    shapes: Iterable[ErrorShape], tolerances: Iterable[Tolerance], repeats: Iterable[Repeat]
) -> tuple[Table, ...]:
    """Every table about noise; those without rows too."""
    rows = tuple(tolerances)
    return _shapes(shapes), _passes_at(rows), _presets(rows), _repeats(repeats)


def _shapes(shapes: Iterable[ErrorShape]) -> Table:
    headers = (
        "edge",
        "output",
        "noise of",
        "overlap",
        "σ/σ noise",
        "mean",
        "median",
        "99%",
        "max",
        "noise 99%",
        "noise max",
    )
    rows = (
        (
            s.edge,
            s.output,
            s.dtype,
            number(s.overlap),
            number(s.sigma_ratio),
            signed(s.error_mean),
            *map(number, (s.error_median, s.error_p99, s.error_max, s.noise_p99, s.noise_max)),
        )
        for s in _shown(shapes)
    )
    spare = ("noise max", "noise 99%", "median", "max", "mean", "99%")
    names = ("edge", "output")
    return make_table(SHAPE, headers, rows, *range(3, 11), spare=spare, names=names)


def _shown(shapes: Iterable[ErrorShape]) -> Iterator[ErrorShape]:
    """All outputs but caches, and the worst cache of each edge."""
    worst: dict[str, ErrorShape] = {}
    for shape in shapes:
        if not shape.output.startswith(PRESENT):
            yield shape
        elif shape.edge not in worst or not shape.overlap >= worst[shape.edge].overlap:
            worst[shape.edge] = shape
    yield from worst.values()


def _passes_at(tolerances: Iterable[Tolerance]) -> Table:
    """The caches of an edge are one row: what the largest of them needs."""
    needed: dict[tuple[str, str], list[Tolerance]] = {}
    for row in tolerances:
        needed.setdefault((row.edge, _family(row.output)), []).append(row)
    rows = (
        (edge, output, *(number(max(getattr(t, name) for t in own)) for name in LEAST))
        for (edge, output), own in needed.items()
    )
    headers = ("edge", "output", "rtol alone", "atol alone", "rtol = atol")
    return make_table(PASSES_AT, headers, rows, 2, 3, 4, names=("edge", "output"))


LEAST = ("rtol", "atol", "both")


def _family(output: str) -> str:
    return "present.*" if output.startswith(PRESENT) else output


def _presets(tolerances: Iterable[Tolerance]) -> Table:
    """One row a preset: what another tool would have said of every output."""
    rows = tuple(tolerances)
    headers = ("tolerance", "rtol", "atol", "verdict", "elements beyond")
    cells = (
        (name, number(p.rtol), number(p.atol), *_beyond([t.outside.get(name) for t in rows]))
        for name, p in PRESETS.items()
        if rows
    )
    spare = ("atol", "rtol", "elements beyond")
    return make_table(FIXED, headers, cells, 1, 2, 4, spare=spare)


def _beyond(counts: list[int | None]) -> tuple[str, str]:
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return "not measured", number(None)
    return "fail" if any(known) else "pass", number(sum(known))


def _repeats(repeats: Iterable[Repeat]) -> Table:
    headers = (
        "corner",
        "variant",
        "kind",
        "max abs",
        "L2",
        "max/noise",
        "L2/noise",
        "median",
        "99%",
        "not finite",
    )
    rows = (
        (
            r.corner,
            r.variant,
            r.kind,
            *map(number, (r.max_abs, r.l2, r.ratio_max, r.ratio_l2, r.median, r.p99)),
            number(r.nonfinite),
        )
        for r in repeats
    )
    spare = ("not finite", "L2", "median", "kind", "99%", "max abs")
    return make_table("A/A runs", headers, rows, *range(3, 10), spare=spare)
