"""What commands about graphs, and about the tool itself, print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.console.words import count, size, table
from surgery.process import one_line

if TYPE_CHECKING:
    from surgery.doctor import Diagnosis
    from surgery.export import ExportResult
    from surgery.export.cache import Entry
    from surgery.export.lineage import Lineage

MAX_ROWS = 200


def export_text(done: ExportResult) -> str:
    """An export for people: where it is, what it is, and how large."""
    kinds = [done.task, f"opset {done.opset}", done.quantize or done.dtype, done.layout]
    return f"{done.model}: {', '.join(kinds)}, {size(sum(done.sizes.values()))}"


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


def doctor_text(found: Diagnosis) -> str:
    """What the doctor found, for people: every row, and how many are not well."""
    rows = [(row.status, row.name, row.found, row.remedy) for row in found.rows]
    bad = sum(row.status == "fail" for row in found.rows)
    said = f"{count(bad, 'failure')}" if bad else "ok"
    return "\n".join([table(("", "what", "found", "way out"), rows), said])
