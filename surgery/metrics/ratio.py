"""One number over another, where either may be zero."""

from __future__ import annotations


def divide(a: float, b: float) -> float:
    """a / b, with 0 / 0 = 0 (no error over no noise) and a / 0 infinite; NaN stays NaN."""
    if b == 0:
        return 0.0 if a == 0 else a * float("inf")
    return a / b
