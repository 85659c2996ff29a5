"""What was found to edit, in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from surgery.console.words import table

if TYPE_CHECKING:
    from surgery.find.result import Change, Found
    from surgery.find.sweep import Sweep

MAX_CHOSEN = 10


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


def sweep_text(found: Sweep) -> str:
    """A sweep for people: every setting, and the one that is proposed."""
    from surgery.find.sweep_page import knee_words, sweep_table

    rows = sweep_table(found)
    return f"{rows.title}\n\n{table(rows.headers, rows.rows)}\n\n{knee_words(found)}"
