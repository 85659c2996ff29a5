"""The tables of llama.cpp, against its own running sums and against numbers worked by hand."""

from __future__ import annotations

from math import exp, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from surgery.evidence import DELTA_LEVELS, KL_LEVELS
from surgery.metrics.summary import delta_table, kl_table, perplexity_table

Array = np.ndarray

values = arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 30))
pairs = st.integers(2, 40).flatmap(
    lambda n: st.tuples(*(arrays(np.float64, n, elements=st.floats(0.01, 12)) for _ in "ab"))
)


class Llama:
    """What `kl_divergence` of perplexity.cpp prints, from the sums it keeps."""

    def __init__(self, base: Array, own: Array) -> None:
        self.n = len(base)
        self.base, self.own = base, own

    def mean(self, total: float, squares: float) -> tuple[float, float]:
        mean = total / self.n
        return mean, sqrt(max(squares / self.n - mean * mean, 0.0) / (self.n - 1))

    def of(self, x: Array) -> tuple[float, float]:
        return self.mean(float(x.sum()), float((x * x).sum()))

    def covariance(self) -> float:
        a, b, n = self.own, self.base, self.n
        return ((a * b).sum() / n - (a.sum() / n) * (b.sum() / n)) / (n - 1)

    def table(self) -> dict[str, float]:
        (log_q, s_q), (log_b, s_b), cov = self.of(self.own), self.of(self.base), self.covariance()
        q, b = exp(log_q), exp(log_b)
        uq, ub = q * s_q, b * s_b
        ratio_error = sqrt(s_q**2 + s_b**2 - 2 * cov)
        return {
            "log_before": log_b,
            "log_before_error": s_b,
            "log_after": log_q,
            "log_after_error": s_q,
            "before": b,
            "before_error": ub,
            "after": q,
            "after_error": uq,
            "correlation": cov / (s_q * s_b),
            "log_ratio": log_q - log_b,
            "log_ratio_error": ratio_error,
            "ratio": exp(log_q - log_b),
            "ratio_error": exp(log_q - log_b) * ratio_error,
            "difference": q - b,
            "difference_error": sqrt(uq**2 + ub**2 - 2 * q * b * cov),
        }


@pytest.mark.parametrize("seed", range(5))
def test_perplexity_is_what_llama_cpp_prints(seed: int) -> None:
    generator = np.random.default_rng(seed)
    base = generator.gamma(2.0, 1.0, 300)
    own = base + generator.normal(0.1, 0.5, 300)
    expected, found = Llama(base, own).table(), perplexity_table(base, own)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_delta_p_is_what_llama_cpp_prints(seed: int) -> None:
    generator = np.random.default_rng(seed)
    base, own = generator.gamma(2.0, 1.0, (2, 301))
    delta = np.exp(-own) - np.exp(-base)
    sums = Llama(base, own)
    mean, error = sums.of(delta)
    square, square_error = sums.of(delta**2)
    found = delta_table(base, own)
    expected = {
        "mean": mean,
        "error": error,
        "rms": sqrt(square),
        "rms_error": 0.5 / sqrt(square) * square_error,
        "median": sorted(delta)[150],
        "25%": sorted(delta)[75],
        "75%": sorted(delta)[225],
        "max": max(delta),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)


def llama_percentile(values: list[float], fraction: float) -> float:
    place = fraction * (len(values) - 1)
    index = int(place)
    rest = place - index
    return (1 - rest) * values[index] + rest * values[min(index + 1, len(values) - 1)]


@given(values)
def test_percentiles_of_kl_are_llamas_and_in_order(kl: Array) -> None:
    found, ordered = kl_table(kl), sorted(kl.tolist())
    shares = [float(level[:-1]) / 100 if level != "median" else 0.5 for level in KL_LEVELS]
    expected = [llama_percentile(ordered, share) for share in shares]
    assert [found[level] for level in KL_LEVELS] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    order = [found[name] for name in ("min", *KL_LEVELS, "max")]
    assert order == sorted(order)
    assert order[0] - 1e-9 <= found["mean"] <= order[-1] + 1e-9


def test_a_small_table_by_hand() -> None:
    found = kl_table(np.array([0.0, 1.0, 2.0, 5.0]))
    assert found["mean"] == 2.0
    assert found["error"] == pytest.approx(sqrt((4 + 1 + 0 + 9) / 3 / 4))
    assert (found["min"], found["median"], found["max"]) == (0.0, 1.5, 5.0)
    # Probabilities 1/2 and 1/4 become 1/4 and 1/2: nothing on average, a quarter each.
    before, after = np.log([2.0, 4.0]), np.log([4.0, 2.0])
    delta = delta_table(before, after)
    assert (delta["mean"], delta["rms"]) == pytest.approx((0.0, 0.25))
    assert (delta["min"], delta["max"]) == pytest.approx((-0.25, 0.25))
    perplexity = perplexity_table(before, after)
    assert perplexity["before"] == perplexity["after"] == pytest.approx(sqrt(8))
    assert perplexity["correlation"] == pytest.approx(-1.0)


@given(pairs)
def test_swapping_the_models_turns_the_ratio_and_the_difference_round(
    both: tuple[Array, Array],
) -> None:
    there, back = perplexity_table(*both), perplexity_table(*reversed(both))
    assert there["log_ratio"] == pytest.approx(-back["log_ratio"], abs=1e-12)
    assert there["difference"] == pytest.approx(-back["difference"], rel=1e-9)
    assert there["log_ratio_error"] == pytest.approx(back["log_ratio_error"], rel=1e-9)
    assert there["ratio"] * back["ratio"] == pytest.approx(1.0)
    assert there.get("correlation", 1.0) == pytest.approx(back.get("correlation", 1.0), rel=1e-6)


@given(pairs)
def test_a_model_differs_from_itself_by_nothing(both: tuple[Array, Array]) -> None:
    own, _ = both
    perplexity, delta = perplexity_table(own, own), delta_table(own, own)
    for name in ("log_ratio", "log_ratio_error", "difference", "difference_error", "ratio_error"):
        assert perplexity[name] == 0.0
    assert perplexity["ratio"] == 1.0
    assert perplexity.get("correlation", 1.0) == pytest.approx(1.0)
    assert set(delta.values()) == {0.0}


@given(pairs)
def test_delta_p_is_a_difference_of_probabilities_in_order(both: tuple[Array, Array]) -> None:
    found = delta_table(*both)
    order = [found[name] for name in ("min", *DELTA_LEVELS, "max")]
    assert order == sorted(order)
    assert order[0] >= -1 and order[-1] <= 1
    assert abs(found["mean"]) <= found["rms"] + 1e-12


def test_of_one_value_there_is_no_error() -> None:
    one = np.array([0.5])
    assert "error" not in kl_table(one)
    assert not [name for name in perplexity_table(one, one) if name.endswith("_error")]
    assert "correlation" not in perplexity_table(one, one)
    assert kl_table(one)["99.9%"] == 0.5


def test_a_perplexity_beyond_float64_is_left_out_and_its_logarithm_is_not() -> None:
    found = perplexity_table(np.array([1.0, 2.0]), np.array([800.0, 900.0]))
    assert found["log_ratio"] == 848.5
    assert "after" not in found and "ratio" not in found and "difference" not in found
    assert found["before"] == pytest.approx(exp(1.5))


def test_what_is_not_a_number_stays_none_and_is_shown() -> None:
    bad = np.array([0.1, np.nan])
    assert np.isnan(kl_table(bad)["mean"]) and np.isnan(kl_table(bad)["median"])
    found = perplexity_table(np.array([0.1, 0.2]), bad)
    assert np.isnan(found["log_after"]) and np.isnan(found["after"])


def test_the_standard_error_is_that_of_a_mean() -> None:
    """Of many means of 50 values, the spread is what one of them says it is."""
    draws = np.random.default_rng(0).exponential(1.0, (2000, 50))
    said = np.mean([kl_table(row)["error"] for row in draws[:200]])
    assert said == pytest.approx(draws.mean(axis=1).std(), rel=0.1)
    assert said == pytest.approx(1 / sqrt(50), rel=0.1)
