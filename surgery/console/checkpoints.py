"""What commands about checkpoints print."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from surgery.console.words import count, size, spans, table

if TYPE_CHECKING:
    from surgery.arch.inspection import Inspection
    from surgery.checkpoint.resize import Side
    from surgery.compare import Comparison
    from surgery.plan import Plan

MAX_ROWS = 200


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
