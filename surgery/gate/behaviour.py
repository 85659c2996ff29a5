"""The gate's law about the statistics of behaviour: what cannot be, limits, and confidence.

A limit asked for with a `confidence` must hold for the measured value (as without one), for the
whole interval at that confidence or a higher one, and be one that the conversion alone keeps to
(A/A: the same model in both runtimes, on the same set). So asking for confidence never turns a
fail into a pass, and neither does a wider interval or a larger A/A difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise

from surgery.evidence import (
    DELTA_LEVELS,
    EDGES,
    EDITS,
    KL_LEVELS,
    PAIRS,
    Divergence,
    Evidence,
    Finding,
    Interval,
    Parting,
)
from surgery.gate.words import IMPOSSIBLE, RUNTIMES
from surgery.policy import Policy, PreservePolicy, TargetRule

UNCERTAIN = "not certain"
UNCALIBRATED = "A/A beyond limit"

LIMITS = {
    "kl": "max_kl",
    "flip_rate": "max_flip_rate",
    "real_flip_rate": "max_real_flip_rate",
    "log_ratio": "max_log_ratio",
}
"""Which limit of `PreservePolicy` each quantity has."""

ROUNDING = 1e-9
SHARES = ("flip_rate", "real_flip_rate", "parted_rate")
ERRORS = ("error", "rms_error")
PERPLEXITIES = ("log_before", "log_after", "before", "after", "ratio")


def judge_behaviour(evidence: Evidence, policy: Policy) -> Iterator[Finding]:
    """Every finding about divergences, partings and intervals."""
    yield from _rows(evidence)
    for name, limit in _limits(policy.preserve):
        for pair in EDITS:
            if name in ("real_flip_rate", "log_ratio"):
                yield from _drift(evidence, pair, name, limit)
            if policy.preserve.confidence is not None:
                yield from _certain(evidence, pair, name, limit, policy.preserve.confidence)
        if policy.preserve.confidence is not None:
            yield from _calibrated(evidence, name, limit)
    for rule in policy.target:
        if rule.confidence is not None:
            for pair in EDITS:
                yield from _certain_change(evidence, rule, pair, rule.confidence)


# ------------------------------------------------------------------------------ what cannot be


def _rows(evidence: Evidence) -> Iterator[Finding]:
    rows: list[tuple[Divergence | Parting | Interval, str, Iterator[str]]]
    rows = [(row, "divergence", _wrong_divergence(row)) for row in evidence.divergence]
    rows += [(row, "responses", _wrong_parting(row)) for row in evidence.partings]
    rows += [
        (row, f"interval of {row.quantity}", _wrong_interval(row)) for row in evidence.intervals
    ]
    for row, what, problems in rows:
        absent = [n for n in PAIRS.get(row.pair, (row.pair,)) if n not in evidence.corners]
        site = "/".join(_place(row.stimulus_set, row.pair, what))
        stage = _stage(row.stimulus_set, row.pair)
        if absent:
            message = f"{site} was measured, but {', '.join(absent)} did not run"
            yield Finding(stage, IMPOSSIBLE, site, message)
        elif found := list(problems):
            symptom = "nan" if any(" is not finite" in problem for problem in found) else IMPOSSIBLE
            yield Finding(stage, symptom, site, f"{site}: {', '.join(found)}")


def _stage(stimulus_set: str, pair: str) -> str:
    if pair in EDGES:
        return "conversion"
    return "preserve" if stimulus_set == "preserve" else "target"


def _place(stimulus_set: str, pair: str, what: str) -> tuple[str, str, str]:
    """Findings of an edge begin with it, those of an edit with its stimulus set."""
    return (pair, stimulus_set, what) if pair in EDGES else (stimulus_set, pair, what)


def _wrong_divergence(row: Divergence) -> Iterator[str]:
    if not row.positions > 0:
        yield f"{row.positions} positions"
    if not 0 <= row.near_ties <= row.flips <= row.positions:
        yield f"{row.near_ties} near-ties of {row.flips} flips at {row.positions} positions"
    if not 0 <= row.tokens <= row.positions:
        yield f"{row.tokens} tokens at {row.positions} positions"
    yield from _wrong_table("KL", row.kl, KL_LEVELS, -ROUNDING, math.inf)
    if row.tokens or row.perplexity or row.delta_p:
        yield from _wrong_table("Δp", row.delta_p, DELTA_LEVELS, -1.0, 1.0)
        yield from _wrong_perplexity(row.perplexity)


def _wrong_table(
    name: str, table: Mapping[str, float], levels: tuple[str, ...], low: float, high: float
) -> Iterator[str]:
    """A mean and percentiles: all there, in order, within [low, high]."""
    order = ("min", *levels, "max")
    yield from _wrong_names(name, table, ("mean", *order), (*ERRORS, "rms"))
    for key, value in table.items():
        least = 0.0 if key in (*ERRORS, "rms") else low
        if math.isfinite(value) and not least <= value <= high:
            yield f"{key} of {name} is {value}"
    found = [table[key] for key in order if key in table]
    if any(a > b for a, b in pairwise(found)):
        yield f"percentiles of {name} are not in order"
    if found and not found[0] - ROUNDING <= table.get("mean", found[0]) <= found[-1] + ROUNDING:
        yield f"the mean of {name} is outside its range"


def _wrong_perplexity(table: Mapping[str, float]) -> Iterator[str]:
    errors = tuple(f"{n}_error" for n in (*PERPLEXITIES, "log_ratio", "difference"))
    optional = (*errors, "correlation", "difference", "before", "after", "ratio")
    yield from _wrong_names("perplexity", table, ("log_before", "log_after", "log_ratio"), optional)
    for key in (*errors, *PERPLEXITIES):
        if table.get(key, 0.0) < -ROUNDING:
            yield f"{key} is {table[key]}"
    if abs(table.get("correlation", 0.0)) > 1 + ROUNDING:
        yield f"correlation is {table['correlation']}"


def _wrong_names(
    name: str, table: Mapping[str, float], needed: tuple[str, ...], optional: tuple[str, ...]
) -> Iterator[str]:
    for key in needed:
        if key not in table:
            yield f"{name} has no {key}"
    for key, value in table.items():
        if key not in (*needed, *optional):
            yield f"{name} has a number called {key}"
        if not math.isfinite(value):
            yield f"{key} of {name} is not finite"


def _wrong_parting(row: Parting) -> Iterator[str]:
    if not (row.responses > 0 and 0 <= row.near_ties <= row.parted <= row.responses):
        yield f"{row.near_ties} near-ties of {row.parted} that part of {row.responses} responses"
    if row.parted == 0:
        if row.first is not None or row.median is not None:
            yield "no response parts, and yet there is a position"
    elif row.first is None or row.median is None or not 0 <= row.first <= row.median < math.inf:
        yield f"responses part first at {row.first}, in the median at {row.median}"


def _wrong_interval(row: Interval) -> Iterator[str]:
    if not (row.count > 0 and 0 < row.confidence < 1):
        yield f"{row.count} measured, confidence {row.confidence}"
    for name in ("low", "estimate", "high"):
        if not math.isfinite(getattr(row, name)):
            yield f"{name} is not finite"
    if not row.low <= row.estimate <= row.high:
        yield f"{row.estimate} is not between {row.low} and {row.high}"
    if row.quantity in SHARES and not (row.low >= 0 and row.high <= 1):
        yield f"a share is between {row.low} and {row.high}"
    if row.quantity == "kl" and row.low < -ROUNDING:
        yield f"a divergence may be {row.low}"


# ------------------------------------------------------------------------------------ preserve


def _limits(preserve: PreservePolicy) -> Iterator[tuple[str, float]]:
    for name, field in LIMITS.items():
        if (limit := getattr(preserve, field)) is not None:
            yield name, limit


def value_of(row: Divergence, name: str) -> float:
    """The size of one quantity of `LIMITS`; NaN where it was not measured."""
    if name == "log_ratio":
        return abs(row.perplexity.get("log_ratio", math.nan))
    if name == "kl":
        return row.kl.get("mean", math.nan)
    flips = row.flips if name == "flip_rate" else row.flips - row.near_ties
    return flips / row.positions if row.positions > 0 else math.nan


def _values(evidence: Evidence, pair: str, name: str) -> list[float]:
    rows = [r for r in evidence.divergence if r.pair == pair and r.stimulus_set == "preserve"]
    return [value_of(row, name) for row in rows]


def _drift(evidence: Evidence, pair: str, name: str, limit: float) -> Iterator[Finding]:
    site, where = f"preserve/{pair}/{name}", RUNTIMES[pair]
    values = _values(evidence, pair, name)
    if not values:
        message = f"{name} of the preserve set was not measured in {where}, but has a limit"
        yield Finding("preserve", "not measured", site, message, None, limit)
    for value in values:
        if not value <= limit:
            message = f"the edit moved the preserve set in {where}: {name} is {value:.3g}"
            yield Finding("preserve", "drift", site, message, value, limit)


def _certain(
    evidence: Evidence, pair: str, name: str, limit: float, confidence: float
) -> Iterator[Finding]:
    site, where = f"preserve/{pair}/{name}", RUNTIMES[pair]
    rows = _intervals(evidence, name, "preserve", pair, confidence)
    if not rows:
        message = f"{name} of the preserve set in {where} {_without(confidence)}"
        yield Finding("preserve", "not measured", site, message, None, limit)
    for row in rows:
        bound = max(abs(row.low), abs(row.high)) if name == "log_ratio" else row.high
        if not bound <= limit:
            message = f"{name} of the preserve set in {where} may be {bound:.3g} {_at(row)}"
            yield Finding("preserve", UNCERTAIN, site, message, bound, limit)


def _calibrated(evidence: Evidence, name: str, limit: float) -> Iterator[Finding]:
    """A limit that the conversion alone exceeds cannot tell an edit from none."""
    for edge in EDGES:
        site = f"preserve/{edge}/{name}"
        values = _values(evidence, edge, name)
        if not values:
            message = f"{name} of the preserve set was not measured on {edge}, which calibrates it"
            yield Finding("preserve", "not measured", site, message, None, limit)
        for value in values:
            if not value <= limit:
                message = (
                    f"the conversion alone moves the preserve set: {name} is {value:.3g} on {edge}"
                )
                yield Finding("preserve", UNCALIBRATED, site, message, value, limit)


# -------------------------------------------------------------------------------------- target


def _certain_change(
    evidence: Evidence, rule: TargetRule, pair: str, confidence: float
) -> Iterator[Finding]:
    site, where = f"{rule.set}/{rule.metric}/{pair}", RUNTIMES[pair]
    rows = _intervals(evidence, rule.metric, rule.set, pair, confidence)
    if not rows:
        message = (
            f"the change of {rule.metric} on the {rule.set} set in {where} {_without(confidence)}"
        )
        yield Finding("target", "not measured", site, message)
    for row in rows:
        for bound, limit in _beyond(row, rule, between_runtimes(evidence, rule)):
            message = (
                f"{rule.metric} on the {rule.set} set may have changed by {bound:+.3g} in {where} "
                f"{_at(row)}, A/A included"
            )
            yield Finding("target", UNCERTAIN, site, message, bound, limit)


def _beyond(row: Interval, rule: TargetRule, difference: float) -> Iterator[tuple[float, float]]:
    """Bounds that do not keep to the rule, and what it asks for."""
    low, high = row.low - difference, row.high + difference
    if rule.min_change is not None and not low >= rule.min_change:
        yield low, rule.min_change
    if rule.max_change is not None and not high <= rule.max_change:
        yield high, rule.max_change


def between_runtimes(evidence: Evidence, rule: TargetRule) -> float:
    """A/A: the largest difference of the rule's metric between the two runtimes of one model; NaN
    where that was not measured."""
    found = [
        abs(row.step(torch, onnx))
        for row in evidence.effects
        if row.metric == rule.metric and row.stimulus_set == rule.set
        for torch, onnx in EDGES.values()
    ]
    return math.nan if not found or any(map(math.isnan, found)) else max(found)


# ------------------------------------------------------------------------------------ intervals


def _intervals(
    evidence: Evidence, quantity: str, stimulus_set: str, pair: str, confidence: float
) -> list[Interval]:
    """Those of the least confidence that is enough: a higher one only widens them."""
    place = (quantity, stimulus_set, pair)
    enough = [
        row
        for row in evidence.intervals
        if (row.quantity, row.stimulus_set, row.pair) == place and row.confidence >= confidence
    ]
    least = min((row.confidence for row in enough), default=None)
    return [row for row in enough if row.confidence == least]


def _without(confidence: float) -> str:
    return f"has no interval at confidence {confidence:g}; measure again, on 8 texts or more"


def _at(row: Interval) -> str:
    return f"at confidence {row.confidence:g}"
