"""Evidence and policy → verdict. Pure: no IO, no clock, no randomness.

The law:
1. A verdict of pass needs proof. A limit holds only if `value <= limit` is true, so NaN fails,
   and so does a ratio below zero.
2. Faults and corners that did not end "ok" fail, whatever else was measured.
3. Otherwise, where nothing was compared the verdict is not_evaluated, never pass.
4. The corners are the original pair or all four. What those corners should have yielded (C_o;
   with all four C_e and the interaction on every stimulus set; every embedding row) and did not
   yield fails.
5. Evidence that no run can have measured fails, even where no limit is set on it: a number that
   is not one or not finite, a negative magnitude, a cosine beyond 1, an error over no noise, a
   row of a corner that did not run.
6. Conversion: on every edge and output, the worst element, the L2 norm and the worst position
   stay within `conversion.max_noise_ratio` times the noise of what the graph computes in, float32
   mostly. The error is also distributed as that noise is (`surgery.gate.noise`).
7. Interaction: on every stimulus set, ||I|| stays within `interaction.max_ratio` of the effect,
   or within `interaction.max_noise_ratio` of the noise. Where the effect itself is within that
   noise it is no yardstick, and noise alone judges.
8. Preserve and target limits hold in PyTorch and in ONNX Runtime, each; a limit asked for but not
   measured fails, and so does one about an edit where no edited model was tested.
9. Where the policy asks for confidence, a limit holds for the whole interval too, and A/A keeps to
   it: `surgery.gate.behaviour`, which also has law 5 for the statistics of behaviour.

A larger error never turns a fail into a pass (a property test holds the gate to that).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from surgery.evidence import CORNERS, EDGES, Conversion, Drift, Effect, Evidence, Finding
from surgery.evidence import Interaction as Measured
from surgery.gate.behaviour import judge_behaviour
from surgery.gate.noise import judge_noise, noise_dtype
from surgery.gate.words import IMPOSSIBLE, RUNTIMES
from surgery.policy import Policy, TargetRule

PASS, FAIL, NOT_EVALUATED = "pass", "fail", "not_evaluated"

EXIT_CODES = {PASS: 0, FAIL: 1, NOT_EVALUATED: 5}
"""What a command that judges exits with."""

UNCOVERED = "embedding not compared"

MUCH_WORSE = 4.0
"""How far apart C_e and C_o must be to blame one conversion and not the converter; words only."""

RHO_TOLERANCE = 0.15
"""How near rho must be to -1, -0.5 or +1 to be named; a quarter lost stays unnamed."""

MAGNITUDE = (0.0, math.inf)
BOUNDS = {
    "cosine": (-1.0001, 1.0001),
    "rho": (-math.inf, math.inf),
    "kl": (-1e-9, math.inf),
    "flip_rate": (0.0, 1.0),
}
"""What a measured number can be, rounding included; every other one is a `MAGNITUDE`."""

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
    rules = (_coverage, _places, _runs, _conversion, judge_noise, _interaction, _numbers)
    rules += (_preserve, _target, judge_behaviour)
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
    if _edited(evidence):
        yield from _without_interaction(evidence)
    yield from _uncovered(evidence)


def _without_interaction(evidence: Evidence) -> Iterator[Finding]:
    """Every stimulus set whose behaviour was measured has an interaction."""
    sets = dict.fromkeys(
        [row.stimulus_set for row in evidence.drift]
        + [row.stimulus_set for row in evidence.effects]
    )
    measured = {row.stimulus_set for row in evidence.interaction}
    if not measured:
        message = "all four corners ran, but the interaction was not measured"
        yield Finding("coverage", "not measured", "I", message)
    for name in sets if measured else ():
        if name not in measured:
            message = f"the interaction was not measured on the {name} set"
            yield Finding("coverage", "not measured", f"I/{name}", message)


def _uncovered(evidence: Evidence) -> Iterator[Finding]:
    """ONNX Runtime looked up every embedding row, or a fault has said that it did not."""
    ran = any(n.startswith("R") and c.status == "ok" for n, c in evidence.corners.items())
    said = any(fault.symptom == UNCOVERED for fault in evidence.faults)
    if ran and not said and not evidence.covered_rows > 0:
        message = "no embedding row was compared in ONNX Runtime"
        yield Finding("coverage", UNCOVERED, "run", message, evidence.covered_rows)


def _places(evidence: Evidence, policy: Policy) -> Iterator[Finding]:
    """Law 5: every row is of corners that ran."""
    for stage, site, needed in _needed(evidence):
        if absent := [name for name in needed if name not in evidence.corners]:
            message = f"{site} was measured, but {', '.join(absent)} did not run"
            yield Finding(stage, IMPOSSIBLE, site, message)


def _needed(evidence: Evidence) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Stage, site and corners of every row."""
    for row in evidence.conversion:
        yield "conversion", f"{row.edge}/{row.output}", EDGES.get(row.edge, (row.edge,))
    for measured in evidence.interaction:
        yield "interaction", f"{measured.stimulus_set}/{measured.output}", CORNERS
    for effect in evidence.effects:
        site = f"{effect.stimulus_set}/{effect.metric}"
        yield _stage(effect.stimulus_set), site, tuple(effect.corners)
    for drift in evidence.drift:
        site = f"{drift.stimulus_set}/{drift.runtime}"
        yield _stage(drift.stimulus_set), site, (f"{drift.runtime}_o", f"{drift.runtime}_e")


def _runs(evidence: Evidence, policy: Policy) -> Iterator[Finding]:
    """Law 5 for what the children themselves cost."""
    for name, corner in evidence.corners.items():
        if bad := _wrong(corner):
            message = f"{name}: {_said(bad)}"
            yield Finding("run", _symptom(bad), name, message)


def _numbers(evidence: Evidence, policy: Policy) -> Iterator[Finding]:
    """Law 5, for rows whose limits may not be set (the others are judged in their own rule)."""
    for effect in evidence.effects:
        site, stage = f"{effect.stimulus_set}/{effect.metric}", _stage(effect.stimulus_set)
        for corner, value in effect.corners.items():
            if not math.isfinite(value):
                message = f"{effect.metric} at {corner} is {value}"
                yield Finding(stage, "nan", f"{site}/{corner}", message, value)
        if effect.count < 0:
            message = f"{effect.metric} was measured on {effect.count} stimuli"
            yield Finding(stage, IMPOSSIBLE, site, message)
    for drift in evidence.drift:
        for name, drifted in _wrong(drift).items():
            site = f"{drift.stimulus_set}/{drift.runtime}/{name}"
            message = f"{name} in {RUNTIMES.get(drift.runtime, drift.runtime)} is {drifted}"
            symptom = _symptom({name: drifted})
            yield Finding(_stage(drift.stimulus_set), symptom, site, message, drifted)


def _wrong(row: Any, *skipped: str) -> dict[str, float]:
    """The numbers of `row` that no run can have measured."""
    named = {f.name: getattr(row, f.name) for f in fields(row) if f.name not in skipped}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, (int, float)) and not _possible(name, value)
    }


def _possible(name: str, value: float) -> bool:
    low, high = BOUNDS.get(name, MAGNITUDE)
    return low <= value <= high and abs(value) < math.inf


def _symptom(bad: Mapping[str, float]) -> str:
    return IMPOSSIBLE if all(abs(value) < math.inf for value in bad.values()) else "nan"


def _said(bad: Mapping[str, float]) -> str:
    return ", ".join(f"{name} is {value}" for name, value in bad.items())


def _stage(stimulus_set: str) -> str:
    return "preserve" if stimulus_set == "preserve" else "target"


# ---------------------------------------------------------------------------------- conversion


def _conversion(evidence: Evidence, policy: Policy) -> Iterator[Finding]:
    for row in evidence.conversion:
        site = f"{row.edge}/{row.output}"
        if not (row.positions > 0 and row.elements > 0):
            message = f"{row.edge} compared no element of {row.output}"
            yield Finding("coverage", "nothing compared", site, message, row.elements)
        if bad := _impossible_error(row):
            message = f"{row.edge} of {row.output}: {_said(bad)}"
            yield Finding("conversion", _symptom(bad), site, message, next(iter(bad.values())))
        elif not _within(row.ratio, policy.conversion.max_noise_ratio):
            yield _wrong_value(row, evidence, policy.conversion.max_noise_ratio)


def _wrong_value(row: Conversion, evidence: Evidence, limit: float) -> Finding:
    ratio, dtype = row.ratio, noise_dtype(row.edge, row.output, evidence)
    message = (
        f"{row.output} is {ratio:.3g} times {dtype} noise away on {row.edge}, "
        f"worst at {row.worst}; {_blame(row, evidence, limit)}"
    )
    site = f"{row.edge}/{row.output}/{row.worst}"
    return Finding("conversion", "wrong value", site, message, ratio, limit)


def _blame(row: Conversion, evidence: Evidence, limit: float) -> str:
    """Which of the two exports is at fault, from the same output on the other edge."""
    other = "C_o" if row.edge == "C_e" else "C_e"
    twins = [r for r in evidence.conversion if r.edge == other and r.output == row.output]
    if not twins:
        return f"there is no {other} to compare with"
    twin = max(row.ratio for row in twins)
    mine, theirs = row.ratio, f"{other} is at {twin:.3g}"
    if mine > MUCH_WORSE * twin:
        at_fault = "edited" if row.edge == "C_e" else "original"
        return f"the conversion of the {at_fault} model is at fault ({theirs})"
    if twin > MUCH_WORSE * mine:
        return f"{other} is worse ({theirs})"
    return f"the converter is at fault, with or without the edit ({theirs})"


def _impossible_error(row: Conversion) -> dict[str, float]:
    """Numbers of `row` that cannot be; its ratios have a limit that judges them."""
    names = ("ratio_max", "ratio_l2", "ratio_position")
    ratios = {name: getattr(row, name) for name in names}
    bad = _wrong(row, *ratios) | {name: r for name, r in ratios.items() if math.isnan(r)}
    if row.flips is not None and row.flips > row.positions:
        bad["flips"] = row.flips
    if row.noise_max == 0 and (row.max_abs != 0 or row.ratio_max != 0):
        bad["noise_max"] = row.noise_max
    if row.noise_l2 == 0 and (row.mean_abs != 0 or row.ratio_l2 != 0):
        bad["noise_l2"] = row.noise_l2
    return bad


def _within(ratio: float, limit: float) -> bool:
    return 0 <= ratio <= limit


# --------------------------------------------------------------------------------- interaction


def _interaction(evidence: Evidence, policy: Policy) -> Iterator[Finding]:
    limits = policy.interaction
    for row in evidence.interaction:
        site = f"{row.stimulus_set}/{row.output}"
        # Against an effect of zero a share and a direction have no meaning: 0/0 is no fault.
        meaningless = ("ratio", "rho") if row.effect == 0 else ()
        bad = _wrong(row, *meaningless)
        if row.noise == 0 and row.norm != 0:
            bad["noise"] = row.noise
        if bad:
            message = f"interaction on {site}: {_said(bad)}"
            yield Finding("interaction", _symptom(bad), site, message, next(iter(bad.values())))
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
        if limit is not None:
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
    for rule in policy.target:
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
