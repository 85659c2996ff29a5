"""The gate's rules about noise: the shape of each error, A/A runs, and a fixed tolerance.

Pure, like the gate. On every edge and output that was compared:
- the error is distributed as the noise is: both distributions overlap by at least
  `conversion.min_overlap`, or the error's sigma is at most `conversion.max_sigma_ratio` of the
  noise's, so that a runtime may be more exact than PyTorch; asked where the ratios hold, since one
  fault is told once;
- where `conversion.preset` names a fixed tolerance, no element lies beyond it. It is asked in
  addition: no tolerance makes up for a rule that failed.
A model run again, with another number of threads, attention or optimisation, stays within
`conversion.max_noise_ratio` of its noise. What is asked for and was not measured fails, and so does
a number that no run can have measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from surgery.evidence import CORNERS, EDGES, ErrorShape, Evidence, Finding, Repeat, Tolerance
from surgery.gate.words import IMPOSSIBLE
from surgery.policy import ConversionPolicy, Policy
from surgery.presets import PRESETS

WRONG_SHAPE = "wrong distribution"

SIGNED = ("noise_mean", "error_mean")
ENDLESS = ("rtol", "atol", "both", "sigma_ratio")
"""May be infinite: no tolerance is large enough; an error over no noise, which its limit judges."""

CHANCE = 28.0
"""Two samples of n elements of one distribution overlap by about 1 - 14/n, for the 56 bins a bell
curve fills (Bhattacharyya's expectation is 1 - (bins - 1) / 8 * 2/n); twice that is allowed for."""

KINDS = ("run", "storage", "compute")


def judge_noise(evidence: Evidence, policy: Policy) -> Iterator[Finding]:
    """What is wrong with the shapes, tolerances and A/A runs of `evidence` under `policy`."""
    yield from _unmeasured(evidence)
    yield from _misplaced(evidence)
    for shape in evidence.shapes:
        yield from _shape(shape, policy.conversion, _told(shape, evidence, policy))
    for tolerance in evidence.tolerances:
        yield from _tolerance(tolerance, policy.conversion.preset)
    for repeat in evidence.repeats:
        yield from _repeat(repeat, policy.conversion.max_noise_ratio)


def noise_dtype(edge: str, output: str, evidence: Evidence) -> str:
    """What the edge's graph computes in, and so what noise its output is held to."""
    same = (row for row in evidence.shapes if (row.edge, row.output) == (edge, output))
    return next((row.dtype for row in same), "float32")


def _unmeasured(evidence: Evidence) -> Iterator[Finding]:
    """Every output whose error was measured has a shape, and the tolerances it would pass."""
    ran = [edge for edge, pair in EDGES.items() if evidence.corners.keys() >= set(pair)]
    rows = (row for row in evidence.conversion if row.edge in ran)
    wanted = dict.fromkeys((row.edge, row.output) for row in rows)
    parts = {
        "shape of the error": {(row.edge, row.output) for row in evidence.shapes},
        "least tolerance": {(row.edge, row.output) for row in evidence.tolerances},
    }
    for what, found in parts.items():
        for edge, output in wanted:
            if (edge, output) not in found:
                message = f"the {what} of {output} was not measured on {edge}"
                yield Finding("coverage", "not measured", f"{edge}/{output}", message)


def _misplaced(evidence: Evidence) -> Iterator[Finding]:
    """Rows of corners that did not run."""
    rows = [(f"{r.edge}/{r.output}", EDGES.get(r.edge, (r.edge,))) for r in evidence.shapes]
    rows += [(f"{r.edge}/{r.output}", EDGES.get(r.edge, (r.edge,))) for r in evidence.tolerances]
    rows += [(_site(r), (r.corner,)) for r in evidence.repeats]
    for site, needed in rows:
        for name in needed:
            if name not in CORNERS or name not in evidence.corners:
                message = f"{site} is of {name}, which did not run"
                yield Finding("conversion", IMPOSSIBLE, site, message)


# --------------------------------------------------------------------------------------- shape


def _told(shape: ErrorShape, evidence: Evidence, policy: Policy) -> bool:
    """Whether the ratios of the same output say already that it is wrong."""
    limit = policy.conversion.max_noise_ratio
    return any(
        not row.ratio <= limit
        for row in evidence.conversion
        if (row.edge, row.output) == (shape.edge, shape.output)
    )


def _shape(row: ErrorShape, limits: ConversionPolicy, told: bool) -> Iterator[Finding]:
    site = f"{row.edge}/{row.output}"
    bad = _bad(row)
    if not row.overlap <= 1:
        bad["overlap"] = row.overlap
    if not row.elements > 0:
        bad["elements"] = row.elements
    if bad:
        yield _impossible(f"the shape of {row.output}'s error on {row.edge}", site, bad)
        return
    least = limits.min_overlap - CHANCE / row.elements
    if not told and row.overlap < least and row.sigma_ratio > limits.max_sigma_ratio:
        message = (
            f"the error of {row.output} is not distributed as {row.dtype} noise on {row.edge}: "
            f"they overlap by {row.overlap:.3g}, expected {least:.3g}, its sigma is "
            f"{row.sigma_ratio:.3g} times the noise's, expected {limits.max_sigma_ratio:g} at "
            f"most, its mean is {row.error_mean:+.3g} times the noise"
        )
        yield Finding("conversion", WRONG_SHAPE, site, message, row.overlap, least)


# ----------------------------------------------------------------------------------- tolerance


def _tolerance(row: Tolerance, preset: str | None) -> Iterator[Finding]:
    site = f"{row.edge}/{row.output}"
    counts = {name: count for name, count in row.outside.items() if not 0 <= count <= row.elements}
    bad = _bad(row) | counts
    if bad:
        yield _impossible(f"the tolerances of {row.output} on {row.edge}", site, bad)
    if preset is None:
        return
    if preset not in row.outside:
        message = f"{row.output} on {row.edge} was not held to {preset}, which the policy asks for"
        yield Finding("coverage", "not measured", site, message)
    elif row.outside[preset] != 0:
        count, known = row.outside[preset], PRESETS[preset]
        message = (
            f"{count} of {row.elements} elements of {row.output} lie beyond the tolerance of "
            f"{preset} (rtol {known.rtol:g}, atol {known.atol:g}) on {row.edge}"
        )
        yield Finding("tolerance", "beyond a fixed tolerance", site, message, float(count), 0.0)


# ------------------------------------------------------------------------------------- A/A runs


def _site(row: Repeat) -> str:
    return f"{row.corner}/{row.output}/{row.variant}"


def _repeat(row: Repeat, limit: float) -> Iterator[Finding]:
    what, bad = f"{row.corner} with {row.variant}", _bad(row)
    if row.kind not in KINDS:
        yield Finding("run", IMPOSSIBLE, _site(row), f"{what} is of no kind: {row.kind}")
    if not row.positions > 0:
        bad["positions"] = row.positions
    if bad:
        yield _impossible(what, _site(row), bad)
    elif row.kind != "run":
        return  # how far a narrower type is off is told, and no fault
    elif row.nonfinite:
        message = f"{what}: {row.nonfinite} values of {row.output} are no numbers only there"
        yield Finding("run", "nan", _site(row), message, float(row.nonfinite), 0.0)
    elif (ratio := max(row.ratio_max, row.ratio_l2)) > limit:
        message = f"{what} gives {row.output} {ratio:.3g} times the noise away from its own run"
        yield Finding("run", "unstable", _site(row), message, ratio, limit)


# -------------------------------------------------------------------------------------- numbers


def _bad(row: Any) -> dict[str, float]:
    """The numbers of a row that no run can have measured."""
    named = {f.name: getattr(row, f.name) for f in fields(row)}
    numbers = {n: v for n, v in named.items() if isinstance(v, (int, float))}
    return {name: value for name, value in numbers.items() if not _possible(name, value)}


def _possible(name: str, value: float) -> bool:
    low = -math.inf if name in SIGNED else 0
    return value >= low and (name in ENDLESS or abs(value) < math.inf)


def _impossible(what: str, site: str, bad: dict[str, float]) -> Finding:
    said = ", ".join(f"{name} is {value}" for name, value in bad.items())
    finite = all(abs(value) < math.inf for value in bad.values())
    symptom = IMPOSSIBLE if finite else "nan"
    return Finding("conversion", symptom, site, f"{what}: {said}", next(iter(bad.values())))
