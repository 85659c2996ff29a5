"""The statistics of behaviour as tables: llama.cpp's, and the intervals of what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from surgery.evidence import DELTA_LEVELS, EDITS, KL_LEVELS, Divergence, Interval
from surgery.report.cells import ABSENT, Table, changed, make_table, number, percent, signed
from surgery.report.model import Report

PAIR_NAMES = {"C_o": "C_o", "C_e": "C_e", "T": "E/PyTorch", "R": "E/ONNX"}
"""C_o and C_e are A/A, one model in both runtimes; E is the edit in one runtime."""

EDIT_NAMES = {"T": "PyTorch", "R": "ONNX Runtime"}

SHOWN = 0.95
"""The confidence of the intervals shown; the report holds others too."""

INTERVAL = "95% interval"
TITLES = (
    "KL divergence",
    "Perplexity",
    "Token probabilities",
    "Top-1 flips",
    "Greedy responses",
    "Changes",
)


def behaviour_tables(report: Report) -> tuple[Table, ...]:
    """Every table, in the order of `TITLES`."""
    shown = {
        (i.quantity, i.stimulus_set, i.pair): i for i in report.intervals if i.confidence == SHOWN
    }
    told = [row for row in report.divergence if row.tokens]
    return (
        _kl(report.divergence, shown),
        _perplexity(told, shown),
        _delta(told),
        _flips(report.divergence, shown),
        _responses(report, shown),
        _changes(report),
    )


Shown = Mapping[tuple[str, str, str], Interval]


def pair_name(pair: str) -> str:
    return PAIR_NAMES.get(pair, pair)


def _kl(rows: Iterable[Divergence], shown: Shown) -> Table:
    levels = ("min", *KL_LEVELS, "max")
    headers: tuple[str, ...] = ("set", "pair", "positions", "mean, nats", "±", INTERVAL, *levels)
    headers += (f"99%, {INTERVAL}",)
    cells = (
        (
            row.stimulus_set,
            pair_name(row.pair),
            number(row.positions),
            number(row.kl.get("mean")),
            number(row.kl.get("error")),
            between(shown.get(("kl", row.stimulus_set, row.pair))),
            *(number(row.kl.get(level)) for level in levels),
            between(shown.get(("kl_99%", row.stimulus_set, row.pair))),
        )
        for row in rows
    )
    spare = (f"99%, {INTERVAL}", *_less_told(KL_LEVELS, "99%"), "min", "positions")
    return make_table(TITLES[0], headers, cells, *range(2, len(headers)), spare=spare)


def _less_told(levels: tuple[str, ...], *kept: str) -> tuple[str, ...]:
    """The percentiles that go first where a table has no room."""
    return tuple(level for level in levels if level not in ("median", *kept))


def _perplexity(rows: Iterable[Divergence], shown: Shown) -> Table:
    headers: tuple[str, ...] = ("set", "pair", "tokens", "PPL before", "PPL after", "correlation")
    headers += ("ln ratio", INTERVAL, "ratio", "difference")
    cells = (
        (
            row.stimulus_set,
            pair_name(row.pair),
            number(row.tokens),
            _with_error(row.perplexity, "before"),
            _with_error(row.perplexity, "after"),
            percent_of(row.perplexity.get("correlation")),
            _with_error(row.perplexity, "log_ratio"),
            between(shown.get(("log_ratio", row.stimulus_set, row.pair))),
            _with_error(row.perplexity, "ratio"),
            _with_error(row.perplexity, "difference"),
        )
        for row in rows
    )
    spare = ("difference", "ratio", "correlation", "tokens")
    return make_table(TITLES[1], headers, cells, *range(2, len(headers)), spare=spare)


def _delta(rows: Iterable[Divergence]) -> Table:
    levels = ("min", *DELTA_LEVELS, "max")
    headers = ("set", "pair", "mean Δp, %", "±", "RMS, %", "± RMS", *levels)
    keys = ("mean", "error", "rms", "rms_error", *levels)
    cells = (
        (row.stimulus_set, pair_name(row.pair), *(_hundredfold(row.delta_p.get(k)) for k in keys))
        for row in rows
    )
    spare = (*_less_told(DELTA_LEVELS), "± RMS")
    return make_table(TITLES[2], headers, cells, *range(2, len(headers)), spare=spare)


def _flips(rows: Iterable[Divergence], shown: Shown) -> Table:
    headers: tuple[str, ...] = (
        "set",
        "pair",
        "positions",
        "same top-1",
        "flips",
        "near-ties",
        "real",
    )
    headers += (INTERVAL, f"real, {INTERVAL}")
    cells = (
        (
            row.stimulus_set,
            pair_name(row.pair),
            number(row.positions),
            percent(1 - row.flips / row.positions) if row.positions else ABSENT,
            number(row.flips),
            number(row.near_ties),
            number(row.flips - row.near_ties),
            *(
                between(shown.get((name, row.stimulus_set, row.pair)), percent)
                for name in ("flip_rate", "real_flip_rate")
            ),
        )
        for row in rows
    )
    spare = ("positions", INTERVAL)
    return make_table(TITLES[3], headers, cells, *range(2, len(headers)), spare=spare)


def _responses(report: Report, shown: Shown) -> Table:
    headers: tuple[str, ...] = ("set", "pair", "responses", "never part", "part", "at near-ties")
    headers += ("first token", "median token", f"part, {INTERVAL}")
    cells = (
        (
            row.stimulus_set,
            pair_name(row.pair),
            number(row.responses),
            percent(1 - row.parted / row.responses) if row.responses else ABSENT,
            number(row.parted),
            number(row.near_ties),
            number(row.first),
            number(row.median),
            between(shown.get(("parted_rate", row.stimulus_set, row.pair)), percent),
        )
        for row in report.partings
    )
    return make_table(TITLES[4], headers, cells, *range(2, len(headers)))


def _changes(report: Report) -> Table:
    """The metrics' changes, which are the intervals of no pair's own statistics."""
    relative = {(e.metric, e.stimulus_set): e.relative for e in report.effects}
    headers = ("metric", "set", "edit in", "n", "change", "confidence", "from", "to")
    cells = (
        (
            row.quantity,
            row.stimulus_set,
            EDIT_NAMES.get(row.pair, row.pair),
            number(row.count),
            spell(row.estimate),
            f"{row.confidence:.4g}",
            spell(row.low),
            spell(row.high),
        )
        for row in report.intervals
        if (row.quantity, row.stimulus_set) in relative and row.pair in EDITS
        for spell in [changed if relative[row.quantity, row.stimulus_set] else signed]
    )
    return make_table(TITLES[5], headers, cells, *range(3, len(headers)), names=("metric",))


def between(interval: Interval | None, spell: Callable[[float], str] = number) -> str:
    """`low … high`."""
    return f"{spell(interval.low)} … {spell(interval.high)}" if interval else ABSENT


def percent_of(share: float | None) -> str:
    return ABSENT if share is None else percent(share)


def _with_error(table: Mapping[str, float], name: str) -> str:
    error = table.get(f"{name}_error")
    value = number(table.get(name))
    return value if error is None else f"{value} ± {number(error)}"


def _hundredfold(share: float | None) -> str:
    return number(None if share is None else 100 * share)
