"""Errors against noise, and the algebra of a lost edit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from surgery.metrics.distance import HALF_ULP, ConversionSums, InteractionSums, Spread
from surgery.metrics.ratio import divide

N, V = 12, 5

numbers = st.floats(-100, 100, width=32)
outputs = arrays(np.float32, (N, V), elements=numbers)
cuts = st.lists(st.integers(1, N - 1), unique=True).map(sorted)

Array = np.ndarray


def wide(values: Array) -> Array:
    return values.astype(np.float64)


def conversion(t: Array, reference: Array, r: Array, at: Sequence[int] = ()) -> ConversionSums:
    sums = ConversionSums()
    for rows in np.split(np.arange(len(t)), list(at)):
        sums.add([f"row {row}" for row in rows], t[rows], reference[rows], r[rows])
    return sums


def interaction(corners: dict[str, Array], at: Sequence[int] = ()) -> InteractionSums:
    sums = InteractionSums()
    for rows in np.split(np.arange(N), list(at)):
        own = {name: values[rows] for name, values in corners.items()}
        sums.add(own, {name: wide(own[name]) for name in ("T_o", "T_e")})
    return sums


@given(outputs, outputs, outputs, cuts)
def test_sums_equal_one_computation_however_batches_are_cut(
    t: Array, noise: Array, r: Array, at: list[int]
) -> None:
    reference = wide(t) + 1e-6 * wide(noise)
    sums, error = conversion(t, reference, r, at), wide(r) - reference
    difference = wide(r) - wide(t)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(difference == 0, 0, difference / np.abs(wide(t)).max(1, keepdims=True))
    noise_max = max(np.abs(wide(t) - reference).max(), HALF_ULP * np.abs(reference).max())
    noise_l2 = max(np.linalg.norm(wide(t) - reference), HALF_ULP * np.linalg.norm(reference))
    expected = {
        "max_abs": np.abs(difference).max(),
        "mean_abs": np.abs(difference).mean(),
        "max_rel": np.abs(relative).max(),
        "noise_max": noise_max,
        "noise_l2": noise_l2,
        "ratio_max": divide(np.abs(error).max(), noise_max),
        "ratio_l2": divide(float(np.linalg.norm(error)), noise_l2),
    }
    found = {
        "max_abs": sums.difference.largest,
        "mean_abs": sums.difference.mean,
        "max_rel": sums.relative.largest,
        "noise_max": sums.noise_max,
        "noise_l2": sums.noise_l2,
        "ratio_max": sums.ratio_max,
        "ratio_l2": sums.ratio_l2,
    }
    assert found == pytest.approx(expected, rel=1e-9)
    assert (sums.positions, sums.difference.count) == (N, N * V)


@given(outputs, outputs)
def test_the_cosine_is_numpys(t: Array, r: Array) -> None:
    norms = np.linalg.norm(wide(t)) * np.linalg.norm(wide(r))
    found = conversion(t, wide(t), r).cosine
    assert (
        math.isnan(found)
        if norms == 0
        else math.isclose(found, (wide(t) * wide(r)).sum() / norms, rel_tol=1e-9, abs_tol=1e-12)
    )


@given(outputs, st.integers(0, N - 1), st.integers(0, V - 1), cuts)
def test_the_worst_position_is_the_one_that_differs_most(
    t: Array, row: int, column: int, at: list[int]
) -> None:
    r = t.copy()
    r[row, column] += 1
    assert conversion(t, wide(t), r, at).worst[1] == f"row {row}"


def test_a_result_as_good_as_rounding_is_one_unit_of_noise() -> None:
    """Where PyTorch happens to be exact, the noise is half a unit in the last place, not zero."""
    exact = np.full((1, 1), 1.0)
    sums = conversion(exact, exact, exact + HALF_ULP)
    assert (sums.ratio_max, sums.ratio_l2) == (1, 1)


@given(outputs, st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, N - 1), cuts)
@pytest.mark.parametrize("corner", ["t", "r", "both"])
def test_what_is_not_finite_never_gives_a_ratio_that_passes(
    corner: str, t: Array, bad: float, row: int, at: list[int]
) -> None:
    r = t.copy()
    reference = wide(t)
    for name, values in (("t", t), ("r", r)):
        if corner in (name, "both"):
            values[row, 0] = bad
    with np.errstate(invalid="ignore"):
        sums = conversion(t, reference, r, at)
    passes = [0 <= ratio <= 8 and math.isfinite(sums.noise_max) for ratio in ratios(sums)]
    assert passes == [False, False]
    assert not sums.difference.largest < math.inf
    assert sums.worst[1] == f"row {row}"


def ratios(sums: ConversionSums) -> tuple[float, float]:
    return sums.ratio_max, sums.ratio_l2


@given(outputs, st.integers(0, N - 1))
@pytest.mark.parametrize("corner", ["T_o", "T_e", "R_o", "R_e"])
def test_nan_in_any_corner_makes_the_interaction_nan(corner: str, values: Array, row: int) -> None:
    corners = {name: values.copy() for name in ("T_o", "T_e", "R_o", "R_e")}
    corners[corner][row, 0] = np.nan
    assert math.isnan(interaction(corners).noise_ratio)


Applied = Callable[[Array, Array], Array]

EDITS: dict[str, tuple[float, Applied]] = {
    "lost": (-1.0, lambda o, e: o),
    "half applied": (-0.5, lambda o, e: (o + e) / 2),
    "applied": (0.0, lambda o, e: e),
    "applied twice": (1.0, lambda o, e: 2 * e - o),
    "undone twice": (-2.0, lambda o, e: 2 * o - e),
}


@pytest.mark.parametrize("name", EDITS)
@given(original=outputs, edit=outputs, converter=outputs, at=cuts)
def test_rho_names_what_became_of_the_edit(
    name: str, original: Array, edit: Array, converter: Array, at: list[int]
) -> None:
    """Whatever the converter itself changes: it is in R_o and R_e alike and cancels."""
    rho, applied = EDITS[name]
    o, e = wide(original), wide(original) + wide(edit)
    c = wide(converter)
    corners = {"T_o": o, "T_e": e, "R_o": o + c, "R_e": applied(o, e) + c}
    sums = interaction(corners, at)
    effect = float(np.linalg.norm(e - o))
    assert sums.effect.l2 == pytest.approx(effect)
    if effect > 1e-6:
        assert sums.rho == pytest.approx(rho, abs=1e-6)
        assert sums.ratio == pytest.approx(abs(rho), abs=1e-6)


@given(outputs, outputs)
def test_an_edit_without_effect_is_judged_by_noise_alone(o: Array, r: Array) -> None:
    sums = interaction({"T_o": o, "T_e": o, "R_o": r, "R_e": r})
    assert (sums.effect.l2, sums.ratio, sums.noise_ratio) == (0, 0, 0)
    off = interaction({"T_o": o, "T_e": o, "R_o": r, "R_e": r + np.float32(1000)})
    assert off.ratio == math.inf
    assert off.noise_ratio > 8


def test_zero_over_zero_is_no_error_and_something_over_zero_is_infinite() -> None:
    assert (divide(0, 0), divide(1, 0), divide(3, 2)) == (0, math.inf, 1.5)
    assert math.isnan(divide(math.nan, 0))


def test_nothing_added_has_no_mean_and_no_size() -> None:
    assert (Spread().largest, Spread().l2, Spread().count) == (0, 0, 0)
    assert math.isnan(Spread().mean)
