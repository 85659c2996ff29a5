"""Rows of behaviour statistics as a run would measure them, to put beside `evidences.clean()`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from evidences import clean

from surgery.evidence import EDITS, PAIRS, Divergence, Evidence, Interval, Parting
from surgery.metrics.summary import delta_table, kl_table, perplexity_table

SETS = ("target", "preserve")
POSITIONS = 100


def divergence(stimulus_set: str, pair: str, **changes: Any) -> Divergence:
    """Of an edit: mean KL 0.003, 2 flips of 100 (one near-tie), ln ratio 0.004; of an edge tiny."""
    size = 1.0 if pair in EDITS else 1e-9
    generator = np.random.default_rng(0)
    kl = generator.exponential(1.0, POSITIONS)
    before = generator.gamma(2.0, 1.0, 90)
    shift = generator.normal(0, 0.01, 90)
    after = before + size * (0.004 + shift - shift.mean())
    row = Divergence(
        stimulus_set=stimulus_set,
        pair=pair,
        positions=POSITIONS,
        kl=kl_table(size * 0.003 * kl / kl.mean()),
        flips=2 if pair in EDITS else 0,
        near_ties=1 if pair in EDITS else 0,
        tokens=90,
        perplexity=perplexity_table(before, after),
        delta_p=delta_table(before, after),
    )
    return replace(row, **changes)


def parting(stimulus_set: str, pair: str, **changes: Any) -> Parting:
    apart = 3 if pair in EDITS else 0
    found = (0, 2.0) if apart else (None, None)
    return replace(Parting(stimulus_set, pair, 10, apart, min(apart, 1), *found), **changes)


def interval(
    quantity: str,
    stimulus_set: str,
    pair: str,
    low: float,
    estimate: float,
    high: float,
    confidence: float = 0.95,
) -> Interval:
    return Interval(quantity, stimulus_set, pair, 54, confidence, estimate, low, high)


def intervals(confidence: float = 0.95) -> tuple[Interval, ...]:
    """What `POLICY` and its kin ask for; wider with more confidence."""
    wide = 1.0 if confidence < 0.97 else 1.5
    rows = []
    for runtime in EDITS:
        for name, estimate, spread in (
            ("kl", 0.003, 0.001),
            ("flip_rate", 0.02, 0.01),
            ("real_flip_rate", 0.01, 0.005),
            ("log_ratio", 0.004, 0.003),
        ):
            low, high = estimate - spread * wide, estimate + spread * wide
            rows.append(
                interval(name, "preserve", runtime, max(low, 0.0), estimate, high, confidence)
            )
        for name, change in (("memory_rate", 0.58), ("context_rate", -0.54)):
            low, high = change - 0.1 * wide, change + 0.1 * wide
            rows.append(interval(name, "target", runtime, low, change, high, confidence))
    return tuple(rows)


@cache
def behaved() -> Evidence:
    """`clean()` with all statistics, and intervals at two confidences."""
    places = [(stimulus_set, pair) for stimulus_set in SETS for pair in PAIRS]
    return replace(
        clean(),
        divergence=tuple(divergence(*place) for place in places),
        partings=tuple(parting(*place) for place in places),
        intervals=(*intervals(0.95), *intervals(0.99)),
    )
