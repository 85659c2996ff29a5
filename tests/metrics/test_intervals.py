"""Intervals hold what they should as often as they say, and are scipy's where scipy has them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from surgery.metrics.intervals import (
    LEAST_TEXTS,
    bootstrap_mean,
    bootstrap_quantile,
    exact_change,
    exact_difference,
    exact_rate,
    resampled,
    wider,
)

Array = np.ndarray
counts = st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
confidences = st.floats(0.5, 0.99)


@given(counts, confidences)
def test_exact_rates_are_scipys(counted: tuple[int, int], confidence: float) -> None:
    hits, count = counted
    expected = stats.binomtest(hits, count).proportion_ci(confidence, "exact")
    assert exact_rate(hits, count, confidence) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("count", [1, 5, 30])
@pytest.mark.parametrize("rate", [0.0, 0.03, 0.5, 0.9])
def test_an_exact_rate_is_held_at_least_as_often_as_it_says(count: int, rate: float) -> None:
    """Summed over every outcome there is, not sampled."""
    held = 0.0
    for hits in range(count + 1):
        low, high = exact_rate(hits, count, 0.9)
        held += stats.binom.pmf(hits, count, rate) * (low <= rate <= high)
    assert held >= 0.9


@pytest.mark.parametrize("rates", [(0.3, 0.1), (0.0, 0.0), (0.5, 0.5), (0.05, 0.9)])
def test_an_exact_change_is_held_at_least_as_often_as_it_says(rates: tuple[float, float]) -> None:
    up, down = rates
    count, held = 8, 0.0
    for gained in range(count + 1):
        for lost in range(count + 1 - gained):
            chance = stats.multinomial.pmf(
                (gained, lost, count - gained - lost), count, (up, down, 1 - up - down)
            )
            low, high = exact_change(gained, lost, count, 0.9)
            held += float(np.nan_to_num(chance)) * (low <= up - down <= high)
    assert held >= 0.9


def test_a_change_by_hand() -> None:
    """Two in three become yes, none becomes no: each share at half the doubt."""
    up, down = exact_rate(2, 3, 0.975), exact_rate(0, 3, 0.975)
    assert exact_change(2, 0, 3, 0.95) == (up[0] - down[1], up[1] - down[0])


def test_one_text_says_next_to_nothing_however_clear_it_is() -> None:
    low, high = exact_change(1, 0, 1, 0.95)
    assert low < -0.9 and high == 1.0
    assert exact_rate(0, 0, 0.95) == (0.0, 1.0)


def test_a_difference_of_rates_by_hand() -> None:
    first, second = exact_rate(3, 10, 0.975), exact_rate(9, 12, 0.975)
    expected = (second[0] - first[1], second[1] - first[0])
    assert exact_difference((3, 10), (9, 12), 0.95) == expected


@given(counts, counts, confidences)
def test_a_difference_turns_round_with_its_shares(
    one: tuple[int, int], other: tuple[int, int], confidence: float
) -> None:
    low, high = exact_difference(one, other, confidence)
    assert exact_difference(other, one, confidence) == pytest.approx((-high, -low))


@given(counts, confidences, st.floats(0, 0.4))
def test_more_confidence_is_never_narrower(
    counted: tuple[int, int], confidence: float, more: float
) -> None:
    sure = min(confidence + more, 0.99)
    narrow, wide = exact_rate(*counted, confidence), exact_rate(*counted, sure)
    assert wide[0] <= narrow[0] + 1e-12 and narrow[1] <= wide[1] + 1e-12


def texts(seed: int, count: int) -> tuple[Array, Array]:
    """Sums and numbers of positions of `count` texts, whose positions are much alike."""
    generator = np.random.default_rng(seed)
    weights = generator.integers(1, 20, count).astype(np.float64)
    return generator.exponential(1.0, count) * weights, weights


def test_the_bootstrap_of_a_mean_is_scipys_but_wider() -> None:
    sums, weights = texts(0, 40)
    found = bootstrap_mean(sums, weights, 0.95)
    plain = stats.bootstrap(
        (sums, weights),
        lambda s, w, axis=-1: s.sum(axis=axis) / w.sum(axis=axis),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = plain.high - plain.low
    assert found is not None
    assert found[0] < plain.low + 0.02 * width and found[1] > plain.high - 0.02 * width
    assert found == pytest.approx((plain.low, plain.high), abs=0.1 * width)


def test_the_bootstrap_holds_the_mean_about_as_often_as_it_says() -> None:
    """Texts of 20 like positions: an interval over positions would hold it a third as often."""
    held = 0
    for seed in range(150):
        bounds = bootstrap_mean(*texts(seed, 30), 0.9)
        assert bounds is not None
        held += bounds[0] <= 1.0 <= bounds[1]
    assert 0.8 <= held / 150 <= 0.97


@settings(max_examples=25)
@given(st.integers(0, 50), st.integers(LEAST_TEXTS, 30), st.floats(0.5, 0.95))
def test_a_bootstrap_holds_its_estimate_and_grows_with_confidence(
    seed: int, count: int, confidence: float
) -> None:
    sums, weights = texts(seed, count)
    narrow, wide = (bootstrap_mean(sums, weights, c) for c in (confidence, confidence + 0.04))
    assert narrow is not None and wide is not None
    assert wide[0] <= narrow[0] <= sums.sum() / weights.sum() <= narrow[1] <= wide[1]
    negative = bootstrap_mean(-sums, weights, confidence)
    assert negative == pytest.approx((-narrow[1], -narrow[0]))


def test_the_bootstrap_of_a_quantile_draws_whole_texts() -> None:
    """Of texts of one value each it is scipy's; of 20 copies of each value it is the same."""
    values = np.random.default_rng(1).exponential(1.0, 60)
    alone = bootstrap_quantile(values, np.arange(60), 0.5, 0.95)
    plain = stats.bootstrap(
        (values,), np.median, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert alone == pytest.approx((plain.low, plain.high), abs=0.1)
    copies = bootstrap_quantile(values.repeat(20), np.arange(60).repeat(20), 0.5, 0.95)
    assert copies == pytest.approx(alone, abs=1e-2)


def test_the_bootstrap_of_a_quantile_holds_it_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(60):
        own = np.random.default_rng(seed).exponential(1.0, 40).repeat(5)
        bounds = bootstrap_quantile(own, np.arange(40).repeat(5), 0.75, 0.9)
        assert bounds is not None
        held += bounds[0] <= np.log(4) <= bounds[1]
    assert 0.8 <= held / 60 <= 0.98


@settings(max_examples=25)
@given(st.integers(0, 20), st.floats(0, 1), st.floats(0.5, 0.95))
def test_a_quantile_is_held_by_its_interval(seed: int, share: float, confidence: float) -> None:
    values = np.random.default_rng(seed).exponential(1.0, 30)
    text = np.arange(30) % 10
    narrow, wide = (
        bootstrap_quantile(values, text, share, c) for c in (confidence, confidence + 0.04)
    )
    assert narrow is not None and wide is not None
    assert values.min() <= wide[0] <= narrow[0] <= np.quantile(values, share) <= narrow[1]
    assert narrow[1] <= wide[1] <= values.max()
    assert bootstrap_quantile(values, text % (LEAST_TEXTS - 1), share, confidence) is None


def test_nothing_is_left_open_about_what_never_varies() -> None:
    weights = np.arange(1.0, 11.0)
    assert bootstrap_mean(0 * weights, weights, 0.95) == (0.0, 0.0)


def test_few_texts_have_no_interval_and_texts_without_positions_are_none() -> None:
    ones = np.ones(LEAST_TEXTS)
    assert bootstrap_mean(ones[1:], ones[1:], 0.95) is None
    assert bootstrap_mean(ones, ones, 0.95) == (1.0, 1.0)
    unheld = np.append(np.ones(LEAST_TEXTS - 1), 0.0)
    assert bootstrap_mean(unheld, unheld, 0.95) is None


def test_the_draws_are_the_same_on_every_run_and_bounded() -> None:
    sums, weights = texts(3, 50)
    assert (resampled(sums, weights) == resampled(sums, weights)).all()
    assert len(resampled(sums, weights)) == 10_000
    many = np.ones(5000)
    assert len(resampled(many, many)) == 2_000


def test_wider_bounds_hold_both() -> None:
    assert wider((0.1, 0.2), (0.15, 0.3)) == (0.1, 0.3)
    assert wider((0.1, 0.2), None) == (0.1, 0.2)
    assert np.isnan(wider((0.1, 0.2), (np.nan, 0.3))[0])
