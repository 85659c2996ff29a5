"""The smallest tolerance that two runtimes' outputs would pass, and who else would pass them.

All of it in the sense of `numpy.isclose(r, t)`: |r - t| <= atol + rtol |t|, equal values are
close, and what is no number is close to nothing. Exact, and streamed: a largest value each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.presets import PRESETS, Preset

Floats = NDArray[np.floating[Any]]

_ROOM = 1 + 4 * 2.0**-52
"""Two roundings of float64 each, so that the comparison itself passes at what is reported."""


@dataclass
class ToleranceSums:
    """rtol: the least that passes with atol 0; atol: with rtol 0; both: with rtol = atol.

    Infinite where none passes. `outside`: elements beyond each of `PRESETS`.
    """

    rtol: float = 0.0
    atol: float = 0.0
    both: float = 0.0
    outside: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PRESETS, 0))

    def add(self, t: Floats, r: Floats) -> None:
        """Adds PyTorch's values `t` and ONNX Runtime's `r`, of one shape."""
        size, difference = _magnitudes(t, r)
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.where(difference == 0, 0.0, difference / size)
            either = np.where(difference < np.inf, difference / (1 + size), np.inf)
        self.rtol = max(self.rtol, _largest(relative))
        self.atol = max(self.atol, _largest(difference))
        self.both = max(self.both, _largest(either))
        for name, preset in PRESETS.items():
            self.outside[name] += int(np.count_nonzero(~_within(preset, size, difference)))


def _magnitudes(t: Floats, r: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """|t| and |r - t|; the difference is infinite where either is no finite number, unless equal,
    and |t| then 0."""
    wide_t, wide_r = np.asarray(t, np.float64), np.asarray(r, np.float64)
    finite = np.isfinite(wide_t) & np.isfinite(wide_r)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where(finite, np.abs(wide_r - wide_t), np.inf)
    return np.where(finite, np.abs(wide_t), 0.0), np.where(wide_t == wide_r, 0.0, difference)


def _largest(values: NDArray[np.float64]) -> float:
    return float(values.max(initial=0.0)) * _ROOM


def _within(preset: Preset, size: Floats, difference: Floats) -> NDArray[np.bool_]:
    absolute, relative = preset.atol, preset.rtol * size
    if preset.rule == "sum":
        return np.asarray(difference <= absolute + relative)
    if preset.rule == "both":
        return np.asarray((difference <= absolute) & (difference <= relative))
    return np.asarray((difference <= absolute) | (difference <= relative))
