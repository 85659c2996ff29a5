"""Where runtimes part, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from surgery.console.words import table
from surgery.process import one_line

if TYPE_CHECKING:
    from surgery.localize import Localization
    from surgery.localize import Row as BoundaryRow
    from surgery.localize.edit import EditTrace
    from surgery.localize.referees import Ruling


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
