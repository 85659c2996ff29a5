"""Distributions of errors: histograms that add up, their overlap, quantiles and sigmas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from surgery.metrics.shape import BINS, Distribution, Histogram, ShapeSums, bins, in_units, overlap

Array = np.ndarray

anything = arrays(np.float64, st.integers(0, 50), elements=st.floats())
numbers = arrays(np.float64, st.integers(1, 50), elements=st.floats(-1e6, 1e6))


def histogram(values: Array) -> Histogram:
    found = Histogram()
    found.add(values)
    return found


def distribution(values: Array) -> Distribution:
    found = Distribution()
    found.add(values)
    return found


@given(anything, anything)
def test_merged_is_the_histogram_of_both(one: Array, other: Array) -> None:
    merged = histogram(one)
    merged.merge(histogram(other))
    assert (merged.counts == histogram(np.concatenate([one, other])).counts).all()
    assert merged.total == len(one) + len(other)


@given(numbers, numbers)
def test_merged_moments_are_those_of_both(one: Array, other: Array) -> None:
    merged = distribution(one)
    merged.merge(distribution(other))
    both = np.concatenate([one, other])
    assert merged.mean == pytest.approx(both.mean(), rel=1e-9, abs=1e-6)
    assert merged.sigma == pytest.approx(math.sqrt((both**2).mean()), rel=1e-9)
    assert merged.largest == np.abs(both).max()


@given(anything)
def test_every_value_has_a_bin_and_its_negative_the_one_opposite(values: Array) -> None:
    found = bins(values)
    assert ((found >= 0) & (found < BINS)).all()
    real = ~np.isnan(values)
    opposite = bins(-values)
    assert (found[real] + opposite[real] == BINS - 2).all()
    assert (found[~real] == BINS - 1).all()


def test_bins_follow_the_order_of_numbers() -> None:
    rising = np.array([-np.inf, -1e9, -3.0, -1.0, -1e-9, 0.0, 2.0**-24, 0.5, 0.7, 1.0, 1e9, np.inf])
    found = bins(rising)
    assert (np.diff(found) >= 0).all()
    assert found[0] == 0 and found[-1] == BINS - 2
    assert found[4] == found[5]  # too small to count
    assert len(set(found[5:10])) == 5


@given(anything.filter(len))
def test_a_distribution_overlaps_itself_wholly(values: Array) -> None:
    assert overlap(histogram(values), histogram(values)) == pytest.approx(1, abs=1e-12)


@given(anything.filter(len), anything.filter(len))
def test_overlap_is_symmetric_and_a_share(one: Array, other: Array) -> None:
    found = overlap(histogram(one), histogram(other))
    assert 0 <= found <= 1
    assert found == overlap(histogram(other), histogram(one))


def test_overlap_of_bell_curves_is_the_closed_form() -> None:
    """exp(-b^2 / 8) for a mean b sigmas off, sqrt(2s / (1 + s^2)) for a sigma s times as large."""
    sample = np.random.default_rng(0).normal(size=400_000)
    for shift in (1.0, 2.0, 4.0):
        found = overlap(histogram(sample), histogram(sample[::-1] + shift))
        assert found == pytest.approx(math.exp(-(shift**2) / 8), abs=0.01)
    for scale in (2.0, 8.0):
        found = overlap(histogram(sample), histogram(sample * scale))
        assert found == pytest.approx(math.sqrt(2 * scale / (1 + scale**2)), abs=0.01)


def test_what_shares_no_bin_does_not_overlap_and_nothing_overlaps_nothing() -> None:
    assert overlap(histogram(np.ones(3)), histogram(-np.ones(3))) == 0
    assert math.isnan(overlap(Histogram(), histogram(np.ones(3))))


@given(arrays(np.float64, 200, elements=st.floats(-1e4, 1e4)), st.floats(0.01, 1))
def test_quantiles_are_numpys_to_a_bin(values: Array, share: float) -> None:
    [found] = histogram(values).magnitudes([share])
    exact = float(np.quantile(np.abs(values), share, method="inverted_cdf"))
    if exact < 2.0**-24:
        assert found == 0
    else:
        assert exact * 2**-0.26 <= found <= exact * 2**0.26


def test_quantiles_beyond_the_bins_and_of_no_number() -> None:
    assert histogram(np.full(4, 1e9)).magnitudes([0.5]) == (math.inf,)
    assert math.isnan(histogram(np.array([1.0, np.nan])).magnitudes([0.9])[0])
    assert math.isnan(Histogram().magnitudes([0.5])[0])


def test_errors_come_in_units_of_their_own_position() -> None:
    sums = ShapeSums()
    noise = np.array([[1.0, -1.0], [100.0, -100.0]])
    sums.add(noise, 3 * noise, np.array([1.0, 100.0]))
    assert sums.noise.sigma == 1
    assert sums.sigma_ratio == 3
    assert sums.error.largest == 3


def test_a_bias_of_all_counts_in_sigma() -> None:
    sample = np.random.default_rng(1).normal(size=(100, 64))
    sums = ShapeSums()
    sums.add(sample, sample + 2, np.ones(100))
    assert sums.error.mean == pytest.approx(2, abs=0.05)
    assert sums.sigma_ratio == pytest.approx(math.sqrt(5), abs=0.05)


def test_an_error_where_there_is_no_noise_is_infinite_and_none_is_none() -> None:
    found = in_units(np.array([[0.0, 1e-9]]), np.array([0.0]))
    assert found.tolist() == [[0.0, math.inf]]
