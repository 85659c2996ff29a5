"""The least tolerance that passes, against numpy.isclose; and the fixed ones of other tools."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from surgery.metrics.tolerance import ToleranceSums
from surgery.presets import PRESETS

Array = np.ndarray

outputs = arrays(np.float32, (6, 4), elements=st.floats(-1e4, 1e4, width=32))


def sums(t: Array, r: Array, cut: int = 3) -> ToleranceSums:
    found = ToleranceSums()
    for rows in (slice(0, cut), slice(cut, None)):
        found.add(t[rows], r[rows])
    return found


def passes(t: Array, r: Array, rtol: float, atol: float) -> bool:
    wide = t.astype(np.float64), r.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isclose(wide[1], wide[0], rtol=rtol, atol=atol).all())


@given(outputs, outputs, st.floats(0, 1e-3), st.integers(0, 6))
def test_the_least_tolerance_passes_and_less_does_not(
    t: Array, other: Array, size: float, cut: int
) -> None:
    r = (t + size * other).astype(np.float32)
    found = sums(t, r, cut)
    for name, rtol, atol in (("rtol", 1, 0), ("atol", 0, 1), ("both", 1, 1)):
        least = getattr(found, name)
        if least == 0:
            assert (t == r).all()
        elif least < math.inf:
            assert passes(t, r, rtol * least, atol * least), name
            less = least * (1 - 1e-6)
            assert not passes(t, r, rtol * less, atol * less), name
        else:
            assert name == "rtol" and ((t == 0) & (r != 0)).any()


@given(outputs, outputs, st.floats(0, 1e-3))
def test_presets_count_as_numpy_does(t: Array, other: Array, size: float) -> None:
    r = (t + size * other).astype(np.float32)
    found = sums(t, r)
    wide = t.astype(np.float64), r.astype(np.float64)
    difference, magnitude = np.abs(wide[1] - wide[0]), np.abs(wide[0])
    for name, preset in PRESETS.items():
        small, near = difference <= preset.atol, difference <= preset.rtol * magnitude
        within = {
            "sum": np.isclose(wide[1], wide[0], rtol=preset.rtol, atol=preset.atol),
            "both": small & near,
            "either": small | near,
        }[preset.rule]
        assert found.outside[name] == np.count_nonzero(~within), name


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["t", "r"])
def test_no_tolerance_passes_what_is_no_number(wrong: float, side: str) -> None:
    t, r = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    (t if side == "t" else r)[1, 2] = wrong
    found = sums(t, r, 1)
    assert (found.rtol, found.atol, found.both) == (math.inf,) * 3
    assert set(found.outside.values()) == {1}


def test_equal_infinities_are_close_as_for_numpy() -> None:
    t = np.array([[np.inf, 1.0]], np.float32)
    found = ToleranceSums()
    found.add(t, t)
    assert (found.rtol, found.atol, found.both) == (0, 0, 0)
    assert not any(found.outside.values())
