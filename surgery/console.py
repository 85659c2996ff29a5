"""What commands print: tables on stdout, progress on stderr where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.process import one_line

if TYPE_CHECKING:
    from surgery.arch.inspection import Inspection
    from surgery.checkpoint.resize import Side
    from surgery.compare import Comparison
    from surgery.doctor import Diagnosis
    from surgery.export import ExportResult
    from surgery.export.cache import Entry
    from surgery.export.lineage import Lineage
    from surgery.find.result import Change, Found
    from surgery.localize import Localization
    from surgery.localize import Row as BoundaryRow
    from surgery.localize.edit import EditTrace
    from surgery.localize.referees import Ruling
    from surgery.plan import Plan

MAX_ROWS = 200
MAX_CHOSEN = 10


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


def inspection_text(found: Inspection) -> str:
    """An inspection for people: facts, then a table of tensors and roles."""
    sizes = ", ".join(f"{name} {value}" for name, value in found.sizes.items())
    dtypes = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in found.dtypes.items())
    lines = [
        f"{found.model}: {found.family} {found.kind}, {found.parameters:,} parameters",
        f"sizes   {sizes}",
        f"dtypes  {dtypes}",
        f"head    {'tied to the embedding' if found.tied else 'not tied'}",
    ]
    if found.not_carried:
        lines.append(f"left    {', '.join(found.not_carried)} (not carried into an edited copy)")
    rows = [
        (row.name, row.role, row.dtype, "×".join(map(str, row.shape)), row.file)
        for row in found.tensors[:MAX_ROWS]
    ]
    more = len(found.tensors) - len(rows)
    tail = [f"… and {more} more; --json lists all"] if more > 0 else []
    table_text = table(("tensor", "role", "dtype", "shape", "file"), rows)
    return "\n".join([*lines, "", table_text, *tail])


def cache_text(found: list[Entry]) -> str:
    """Captured graphs for people: of what, for what, and how large."""
    rows = [
        (
            str(entry.facts["family"]),
            str(entry.facts["layers"]),
            str(entry.facts["task"]),
            str(entry.facts["opset"]),
            str(entry.facts["dtype"]),
            size(entry.size),
            entry.path.stem[:12],
        )
        for entry in found
    ]
    header = ("family", "layers", "task", "opset", "dtype", "size", "key")
    total = f"{count(len(found), 'graph')}, {size(sum(entry.size for entry in found))}"
    return "\n".join([*([table(header, rows)] if rows else []), total])


def doctor_text(found: Diagnosis) -> str:
    """What the doctor found, for people: every row, and how many are not well."""
    rows = [(row.status, row.name, row.found, row.remedy) for row in found.rows]
    bad = sum(row.status == "fail" for row in found.rows)
    said = f"{count(bad, 'failure')}" if bad else "ok"
    return "\n".join([table(("", "what", "found", "way out"), rows), said])


def localization_text(edge: str, found: Localization) -> str:
    """A localisation for people: errors at every boundary, then what brings them in."""
    rows = [
        (row.site, f"{row.noise:.2g}", f"{row.error:.3g}", f"{row.introduced:.3g}", _mark(row))
        for row in found.rows
    ]
    header = ("boundary", "noise", "error/noise", "introduced/noise", "")
    lines = [f"{edge} on {one_line(found.batch)}", table(header, rows), ""]
    if found.left_out:
        lines.append(f"of another shape, not compared: {', '.join(found.left_out)}")
    if not found.faults:
        lines.append("no module brings an error in" if found.clean else f"not found: {found.note}")
    for fault in found.faults:
        lines += [one_line(str(fault)), *map(_ruled, fault.referees)]
    if found.edit is not None:
        lines += ["", *_edit_lines(found.edit)]
    return "\n".join(lines)


def _edit_lines(found: EditTrace) -> Iterator[str]:
    """The interaction where it says something: the residual stream, and where the edit acts."""
    from surgery.report.tables import sites_table

    shown = sites_table(found.rows)
    if shown.rows:
        yield table(shown.headers, shown.rows)
    yield one_line(str(found))


def _ruled(ruling: Ruling) -> str:
    """One referee: how far off it is there, in units of the noise, or why it gave nothing."""
    mark = "right" if ruling.right else "wrong"
    told = one_line(ruling.why) if ruling.ratio is None else f"{ruling.ratio:.3g}, {mark}"
    return f"  {ruling.referee}: {told}"


def _mark(row: BoundaryRow) -> str:
    return "<- comes in here" if row.guilty else ""


def plan_text(found: Plan) -> str:
    """A plan for people: what is written, what it costs, what changes besides."""
    counts: dict[str, list[Any]] = {}
    for step in found.steps:
        counts.setdefault(step.tensor, []).append(step)
    rows = [
        (
            name,
            own[0].role,
            str(len(own)),
            size(sum(map(found.written_bytes, own))),
            found.tensors[name].file,
        )
        for name, own in list(counts.items())[:MAX_ROWS]
    ]
    lines = [
        table(("tensor", "role", "regions", "written", "file"), rows),
        f"{count(len(counts), 'tensor')} in {count(len(found.edits), 'edit')}; "
        f"{size(found.edited_bytes)} of weights written, {size(found.disk_bytes)} on disk, "
        f"about {size(found.peak_bytes)} of memory",
    ]
    lines += [f"new tensor {tensor.name} in {tensor.file}" for tensor in found.added]
    lines += [f"{tensor} becomes {shape}" for tensor, shape in _new_shapes(found)]
    lines += [f"config.json: {key} becomes {value}" for key, value in found.config.items()]
    lines += [f"not carried: {file}" for file in found.base.not_carried]
    return "\n".join(lines)


def _new_shapes(found: Plan) -> Iterator[tuple[str, str]]:
    for tensor in found.resized:
        before, after = (
            "×".join(map(str, shape))
            for shape in (found.shape("before", tensor), found.shape("after", tensor))
        )
        yield tensor, f"{after} instead of {before}"


def plan_json(found: Plan) -> dict[str, Any]:
    """A plan as data."""
    return {
        "model": str(found.base.root),
        "family": found.arch.family,
        "recipe_sha256": found.recipe.sha256,
        "inputs": found.inputs,
        "tensors": [
            {
                "name": name,
                "role": str(found.arch.roles[name]),
                "dtype": found.tensors[name].dtype,
                "shape": list(found.tensors[name].shape),
                "file": found.tensors[name].file,
                "regions": [
                    {
                        "edit": step.edit,
                        "op": found.edits[step.edit].op,
                        "start": list(step.target.region.start),
                        "stop": list(step.target.region.stop),
                    }
                    for step in found.steps_of(name)
                ],
            }
            for name in found.edited
        ],
        "edited_bytes": found.edited_bytes,
        "disk_bytes": found.disk_bytes,
        "peak_bytes": found.peak_bytes,
        "added": [tensor.name for tensor in found.added],
        "pruned": _resized(found, "before"),
        "grown": _resized(found, "after"),
        "config": found.config,
        "not_carried": list(found.base.not_carried),
    }


def _resized(found: Plan, longer: Side) -> dict[str, list[int]]:
    """The new shapes of tensors of which that on one side is the longer."""
    return {
        tensor: list(found.shape("after", tensor))
        for tensor, resize in found.resized.items()
        if resize.longer == longer
    }


def comparison_text(found: Comparison) -> str:
    """A comparison of weights for people: one row per tensor that differs."""
    rows = [
        (
            change.name,
            spans(change.rows),
            spans(change.columns),
            "–" if change.frobenius is None else f"{change.frobenius:.4g}",
            "–" if change.max_abs is None else f"{change.max_abs:.4g}",
            "–" if change.rank is None else str(change.rank),
        )
        for change in found.changed[:MAX_ROWS]
    ]
    head = ("tensor", "rows", "columns", "Frobenius", "max", "rank")
    summary = f"changed: {count(len(found.changed), 'tensor')}; equal: {found.equal}"
    others = [
        f"{label}: {', '.join(names)}"
        for label, names in (
            ("only in A", found.only_a),
            ("only in B", found.only_b),
            ("other shape or dtype", found.other_form),
        )
        if names
    ]
    return "\n".join([*([table(head, rows)] if rows else []), summary, *others])


def lineage_text(found: Lineage) -> str:
    """A lineage for people: initializers that are tensors, then what is left and what is wrong."""
    shown = [row for row in found.rows if row.status != "constant"]
    rows = [
        (one_line(row.name, 200), row.status, _few(row.tensors), ", ".join(row.transform) or "–")
        for row in shown[:MAX_ROWS]
    ]
    more = len(shown) - len(rows)
    lines = [table(("initializer", "status", "tensor", "transform"), rows)] if rows else []
    lines += [f"… and {more} more; --json lists all"] if more > 0 else []
    lines += [f"unused: {name}: {reason}" for name, reason in found.unused.items()]
    lines += [f"{fault.symptom}: {fault.message}" for fault in found.findings]
    return "\n".join([*lines, _lineage_summary(found)])


def _few(names: Sequence[str], limit: int = 2) -> str:
    """The first names and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "") or "–"


def _lineage_summary(found: Lineage) -> str:
    counts: dict[str, int] = {}
    for row in found.rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    statuses = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    verdict = "ok" if found.ok else "FAILED"
    return f"{found.onnx}: {verdict}, {count(len(found.rows), 'initializer')}: {statuses}"


def spans(indices: Sequence[int] | None, limit: int = 4) -> str:
    """Sorted indices as ranges, `0-31, 64`, the first few of them."""
    if indices is None:
        return "–"
    found: list[list[int]] = []
    for index in indices:
        if found and index == found[-1][1] + 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in found[:limit]]
    return ", ".join([*shown, "…"] if len(found) > limit else shown)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Left-aligned columns under a head, two spaces apart."""
    cells = [head, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def found_text(found: Found, recipe: Path) -> str:
    """A search for people: what was chosen, what it does, and what chance does."""
    rows = [_change_row("held out", found.effect)]
    rows += [_change_row("cost", cost) for cost in found.costs]
    head = ("", "set", "metric", "texts", "before", "after", "change", "95 % interval")
    bound = found.control.bound(found.sign)
    shown = found.ranking.columns
    best = [
        tuple(f"{value:.4g}" for value in found.ranking.rows[index])
        for index in found.chosen[:MAX_CHOSEN]
    ]
    more = len(found.chosen) - len(best)
    parts = [
        f"{found.kind} by {found.method}, to {found.direction} {found.effect.metric}: "
        f"{len(found.chosen)} of {len(found.ranking.rows)} candidates",
        table(shown, best) + (f"\n… and {more} more" if more else ""),
        table(head, rows),
        f"{len(found.control.changes)} random edits of equal size: {found.control.mean:+.3g} on "
        f"average, {bound:+.3g} at 95 %",
        f"ABOVE CHANCE: {recipe}" if found.above_chance else f"NO BETTER: {found.why_not}",
    ]
    return "\n\n".join(parts)


def _change_row(what: str, change: Change) -> tuple[str, ...]:
    interval = f"{change.low:+.3g} … {change.high:+.3g}" if change.low == change.low else "–"
    return (
        what,
        change.stimulus_set,
        change.metric,
        f"{change.count:.0f}",
        f"{change.before:.4g}",
        f"{change.after:.4g}",
        f"{change.change:+.3g}",
        interval,
    )


def export_text(done: ExportResult) -> str:
    """An export for people: where it is, what it is, and how large."""
    kinds = [done.task, f"opset {done.opset}", done.quantize or done.dtype, done.layout]
    return f"{done.model}: {', '.join(kinds)}, {size(sum(done.sizes.values()))}"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size(nbytes: int) -> str:
    """Bytes in the largest binary unit that keeps a digit before the point."""
    value, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"
