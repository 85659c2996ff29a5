"""Evidence and policy → verdict. Pure: no IO, no clock, no randomness.

The law:
1. A verdict of pass needs proof. A limit holds only if `value <= limit` is true, so NaN fails,
   and so does a ratio below zero.
2. Faults and corners that did not end "ok" fail, whatever else was measured.
3. Otherwise, where nothing was compared the verdict is not_evaluated, never pass.
4. The corners are the original pair or all four. What those corners should have yielded (C_o;
   with all four C_e and the interaction) and did not yield fails.
5. A number that is not one fails, even where no limit is set on it; so does an infinite
   yardstick, against which any error would look small.
6. Conversion: on every edge and output, the worst and the L2 error stay within
   `conversion.max_noise_ratio` times float32 noise.
7. Interaction: on every stimulus set, ||I|| stays within `interaction.max_ratio` of the effect,
   or within `interaction.max_noise_ratio` of the noise. Where the effect itself is within that
   noise it is no yardstick, and noise alone judges.
8. Preserve and target limits hold in PyTorch and in ONNX Runtime, each; a limit asked for but not
   measured fails. They speak about an edit, so only all four corners are held to them.

A larger error never turns a fail into a pass (a property test holds the gate to that).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from surgery.evidence import CORNERS, EDGES, Conversion, Drift, Effect, Evidence, Finding
from surgery.evidence import Interaction as Measured
from surgery.policy import Policy, TargetRule

PASS, FAIL, NOT_EVALUATED = "pass", "fail", "not_evaluated"

RUNTIMES = {"T": "PyTorch", "R": "ONNX Runtime"}

MUCH_WORSE = 4.0
"""How far apart C_e and C_o must be to blame one conversion and not the converter; words only."""

RHO_TOLERANCE = 0.15
"""How near rho must be to -1, -0.5 or +1 to be named; a quarter lost stays unnamed."""

YARDSTICKS = frozenset({"noise_max", "noise_l2", "noise", "effect"})
"""What errors are divided by, or compared with."""

RHO_NAMES = {-1.0: "the edit was lost", -0.5: "half lost", 1.0: "applied twice"}


@dataclass(frozen=True)
class Verdict:
    """verdict: `pass`, `fail` or `not_evaluated`; findings: why it is not `pass`, in order."""

    verdict: str
    findings: tuple[Finding, ...]


def judge(evidence: Evidence, policy: Policy) -> Verdict:
    """The verdict on `evidence` under `policy`."""
    broken = (*evidence.faults, *_corners(evidence))
    if not broken and not evidence.compared > 0:
        return Verdict(NOT_EVALUATED, (_nothing_compared(evidence),))
    rules: tuple[Callable[[Evidence, Policy], Iterator[Finding]], ...]
    rules = (_coverage, _conversion, _interaction, _numbers, _preserve, _target)
    found = [finding for rule in rules for finding in rule(evidence, policy)]
    findings = (*broken, *found)
    return Verdict(FAIL if findings else PASS, findings)


def _corners(evidence: Evidence) -> Iterator[Finding]:
    for name, corner in evidence.corners.items():
        if corner.status != "ok":
            why = f": {corner.detail}" if corner.detail else ""
            message = f"{name} ({corner.runtime}) ended with status {corner.status}{why}"
            yield Finding("run", corner.status, name, message)


def _nothing_compared(evidence: Evidence) -> Finding:
    ran = ", ".join(evidence.corners) or "no corner"
    message = f"nothing was compared ({ran} ran), so there is nothing to judge"
    return Finding("coverage", "nothing compared", "run", message, evidence.compared)


# ------------------------------------------------------------------------------------ coverage


def _edited(evidence: Evidence) -> bool:
    """Whether the run has the edited pair, so that the edit can be judged too."""
    return all(name in evidence.corners for name in CORNERS)


def _coverage(evidence: Evidence, policy: Policy) -> Iterator[Finding]:
    needed = CORNERS if {"T_e", "R_e"} & set(evidence.corners) else ("T_o", "R_o")
    for name in needed:
        if name not in evidence.corners:
            yield Finding("coverage", "missing corner", name, f"corner {name} did not run")
    measured = {row.edge for row in evidence.conversion}
    for edge, pair in EDGES.items():
        if evidence.corners.keys() >= set(pair) and edge not in measured:
            message = f"{' and '.join(pair)} ran, but {edge} was not measured"
            yield Finding("coverage", "not measured", edge, message)
    if _edited(evidence) and not evidence.interaction:
        message = "all four corners ran, but the interaction was not measured"
        yield Finding("coverage", "not measured", "I", message)


def _numbers(evidence: Evidence, policy: Policy) -> Iterator[Finding]:
    """Law 5, for rows whose limits may not be set (the others are judged in their own rule)."""
    for effect in evidence.effects:
        for corner, value in effect.corners.items():
            if not math.isfinite(value):
                site = f"{effect.stimulus_set}/{effect.metric}/{corner}"
                message = f"{effect.metric} at {corner} is {value}"
                yield Finding(_stage(effect.stimulus_set), "nan", site, message, value)
    for drift in evidence.drift:
        for name in ("kl", "flip_rate"):
            value = getattr(drift, name)
            if not math.isfinite(value):
                site = f"{drift.stimulus_set}/{drift.runtime}/{name}"
                message = f"{name} in {RUNTIMES.get(drift.runtime, drift.runtime)} is {value}"
                yield Finding(_stage(drift.stimulus_set), "nan", site, message, value)


def _stage(stimulus_set: str) -> str:
    return "preserve" if stimulus_set == "preserve" else "target"


# ---------------------------------------------------------------------------------- conversion


def _conversion(evidence: Evidence, policy: Policy) -> Iterator[Finding]:
    for row in evidence.conversion:
        site = f"{row.edge}/{row.output}"
        if not (row.positions > 0 and row.elements > 0):
            message = f"{row.edge} compared no element of {row.output}"
            yield Finding("coverage", "nothing compared", site, message, row.elements)
        if bad := _not_numbers(row):
            message = f"{row.edge} of {row.output}: {', '.join(bad)} not a number"
            yield Finding("conversion", "nan", site, message, math.nan)
        elif not _within(_worst(row), policy.conversion.max_noise_ratio):
            yield _wrong_value(row, evidence, policy.conversion.max_noise_ratio)


def _worst(row: Conversion) -> float:
    """The larger of both ratios; NaN where either is none."""
    ratios = (row.ratio_max, row.ratio_l2)
    return max(ratios) if all(ratio >= 0 for ratio in ratios) else math.nan


def _wrong_value(row: Conversion, evidence: Evidence, limit: float) -> Finding:
    ratio = _worst(row)
    message = (
        f"{row.output} is {ratio:.3g} times float32 noise away on {row.edge}, worst at "
        f"{row.worst}; {_blame(row, evidence, limit)}"
    )
    site = f"{row.edge}/{row.output}/{row.worst}"
    return Finding("conversion", "wrong value", site, message, ratio, limit)


def _blame(row: Conversion, evidence: Evidence, limit: float) -> str:
    """Which of the two exports is at fault, from the same output on the other edge."""
    other = "C_o" if row.edge == "C_e" else "C_e"
    twins = [r for r in evidence.conversion if r.edge == other and r.output == row.output]
    if not twins:
        return f"there is no {other} to compare with"
    twin = max(map(_worst, twins))
    mine, theirs = _worst(row), f"{other} is at {twin:.3g}"
    if mine > MUCH_WORSE * twin:
        at_fault = "edited" if row.edge == "C_e" else "original"
        return f"the conversion of the {at_fault} model is at fault ({theirs})"
    if twin > MUCH_WORSE * mine:
        return f"{other} is worse ({theirs})"
    return f"the converter is at fault, with or without the edit ({theirs})"


def _not_numbers(row: Conversion | Measured, *skipped: str) -> list[str]:
    """Fields of `row` that are NaN, or infinite yardsticks."""
    named = ((f.name, getattr(row, f.name)) for f in fields(row) if f.name not in skipped)
    numbers = {name: value for name, value in named if isinstance(value, (int, float))}
    return [
        name
        for name, value in numbers.items()
        if math.isnan(value) or (name in YARDSTICKS and math.isinf(value))
    ]


def _within(ratio: float, limit: float) -> bool:
    return 0 <= ratio <= limit


# --------------------------------------------------------------------------------- interaction


def _interaction(evidence: Evidence, policy: Policy) -> Iterator[Finding]:
    limits = policy.interaction
    for row in evidence.interaction:
        site = f"{row.stimulus_set}/{row.output}"
        # Against an effect of zero a share and a direction have no meaning: 0/0 is no fault.
        meaningless = ("ratio", "rho") if row.effect == 0 else ()
        if bad := _not_numbers(row, *meaningless):
            message = f"interaction on {site}: {', '.join(bad)} not a number"
            yield Finding("interaction", "nan", site, message, math.nan)
        elif not _within(row.noise_ratio, limits.max_noise_ratio):
            if row.effect <= limits.max_noise_ratio * row.noise:
                yield _beyond_noise(row, site, limits.max_noise_ratio)
            elif not _within(row.ratio, limits.max_ratio):
                yield _beyond_effect(row, site, limits.max_ratio)


def _beyond_noise(row: Measured, site: str, limit: float) -> Finding:
    message = (
        f"the runtimes disagree about the edit by {row.noise_ratio:.3g} times noise on {site}, "
        "where the edit itself does nothing beyond noise"
    )
    return Finding("interaction", "wrong value", site, message, row.noise_ratio, limit)


def _beyond_effect(row: Measured, site: str, limit: float) -> Finding:
    name = name_rho(row.rho)
    message = (
        f"{name or 'the edit has another effect'} in ONNX Runtime on {site}: "
        f"||I||/||E|| = {row.ratio:.3g}, rho = {row.rho:+.3f}"
    )
    return Finding("interaction", name or "wrong value", site, message, row.ratio, limit)


def name_rho(rho: float) -> str | None:
    """What an interaction along the edit's own direction means, within `RHO_TOLERANCE`."""
    near = (name for at, name in RHO_NAMES.items() if abs(rho - at) <= RHO_TOLERANCE)
    return next(near, None)


# ------------------------------------------------------------------------- preserve and target


def _preserve(evidence: Evidence, policy: Policy) -> Iterator[Finding]:
    limits = {"kl": policy.preserve.max_kl, "flip_rate": policy.preserve.max_flip_rate}
    for name, limit in limits.items():
        if limit is not None and _edited(evidence):
            for runtime in RUNTIMES:
                yield from _drift(evidence, runtime, name, limit)


def _drift(evidence: Evidence, runtime: str, name: str, limit: float) -> Iterator[Finding]:
    site, spoken = f"preserve/{runtime}/{name}", RUNTIMES[runtime]
    rows = [d for d in evidence.drift if _is_preserve(d, runtime)]
    if not rows:
        message = f"{name} of the preserve set was not measured in {spoken}, but has a limit"
        yield Finding("preserve", "not measured", site, message, None, limit)
    for row in rows:
        value = getattr(row, name)
        # A value that is no number has its finding already (law 5).
        if math.isfinite(value) and not value <= limit:
            message = f"the edit moved the preserve set in {spoken}: {name} is {value:.3g}"
            yield Finding("preserve", "drift", site, message, value, limit)


def _is_preserve(drift: Drift, runtime: str) -> bool:
    measured = drift.runtime == runtime and drift.positions > 0
    return measured and drift.stimulus_set == "preserve"


def _target(evidence: Evidence, policy: Policy) -> Iterator[Finding]:
    for rule in policy.target if _edited(evidence) else ():
        rows = [e for e in evidence.effects if _matches(e, rule)]
        for runtime, spoken in RUNTIMES.items():
            site = f"{rule.set}/{rule.metric}/{runtime}"
            if not rows:
                message = f"{rule.metric} was not measured on the {rule.set} set in {spoken}"
                yield Finding("target", "not measured", site, message)
            for row in rows:
                yield from _change(row.change(runtime), rule, site, spoken)


def _matches(effect: Effect, rule: TargetRule) -> bool:
    named = effect.metric == rule.metric and effect.stimulus_set == rule.set
    return named and effect.count > 0


def _change(change: float, rule: TargetRule, site: str, spoken: str) -> Iterator[Finding]:
    what = f"{rule.metric} on the {rule.set} set changed by {change:+.3g} in {spoken}"
    if rule.min_change is not None and not change >= rule.min_change:
        message = f"{what}, expected at least {rule.min_change:+g}"
        yield Finding("target", "too little change", site, message, change, rule.min_change)
    if rule.max_change is not None and not change <= rule.max_change:
        message = f"{what}, expected at most {rule.max_change:+g}"
        yield Finding("target", "too much change", site, message, change, rule.max_change)
