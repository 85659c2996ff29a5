"""Tables of text, and numbers in words."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Left-aligned columns under a head, two spaces apart."""
    cells = [head, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


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


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size(nbytes: int) -> str:
    """Bytes in the largest binary unit that keeps a digit before the point."""
    value, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"
