"""Divergences between next-token distributions are what their definitions say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from surgery.metrics.divergence import kl_divergence, log_probabilities, token_nll, top1_flips

N, V = 6, 9
ROUNDING = 1e-12

Array = np.ndarray
logits = arrays(np.float32, (N, V), elements=st.floats(-60, 60, width=32))


@given(logits, logits)
def test_kl_is_never_negative(p: Array, q: Array) -> None:
    assert (kl_divergence(p, q) >= -ROUNDING).all()


@given(logits, st.floats(-50, 50))
def test_kl_is_zero_for_equal_distributions(p: Array, shift: float) -> None:
    """Logits that differ by a constant are the same distribution."""
    assert (kl_divergence(p, p) == 0).all()
    assert kl_divergence(p, p.astype(np.float64) + shift) == pytest.approx(np.zeros(N), abs=1e-9)


def test_kl_is_the_sum_of_its_definition() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.8, 0.1, 0.1])
    expected = 0.5 * np.log(0.5 / 0.8) + 2 * 0.25 * np.log(0.25 / 0.1)
    assert kl_divergence(np.log(p)[None], np.log(q)[None]) == pytest.approx([expected])


@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e-5, 1e-3, 0.3])
def test_tiny_divergences_are_exact_and_never_negative(size: float) -> None:
    """Against long doubles, where the plain sum p (log p - log q) has digits to spare."""
    generator = np.random.default_rng(0)
    p = generator.normal(0, 5, (50, 300))
    q = p + size * generator.normal(size=p.shape)
    log_p, log_q = (np.asarray(x, np.longdouble) for x in (p, q))
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    log_q -= np.log(np.exp(log_q).sum(axis=1, keepdims=True))
    d = log_p - log_q
    expected = (np.exp(log_p) * (d + np.expm1(-d))).sum(axis=1).astype(np.float64)
    found = kl_divergence(p, q)
    assert (found >= 0).all()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=0)


@given(logits)
def test_probabilities_sum_to_one(p: Array) -> None:
    assert np.exp(log_probabilities(p)).sum(axis=1) == pytest.approx(np.ones(N))


@given(logits, logits)
def test_flips_are_symmetric_and_none_between_equals(a: Array, b: Array) -> None:
    assert top1_flips(a, b) == top1_flips(b, a)
    assert 0 <= top1_flips(a, b) <= N
    assert top1_flips(a, a) == 0


def test_a_flip_is_another_most_likely_token() -> None:
    a, b = np.eye(3), np.eye(3)[[0, 2, 1]]
    assert top1_flips(a, b) == 2
    assert top1_flips(np.zeros((1, 3)), np.array([[1.0, 1.0, 0.0]])) == 0, "ties go to the first"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@given(p=logits, row=st.integers(0, N - 1))
def test_what_is_not_finite_gives_nan_in_its_row_alone(bad: float, p: Array, row: int) -> None:
    q = p.copy()
    q[row, 2] = bad
    with np.errstate(invalid="ignore"):
        found = (kl_divergence(p, q), kl_divergence(q, p), token_nll(q, np.zeros(N, np.int64)))
    for values in found:
        assert not np.isfinite(values[row])
        assert np.isfinite(np.delete(values, row)).all()


@given(logits, arrays(np.int64, N, elements=st.integers(0, V - 1)))
def test_nll_is_torchs_cross_entropy(p: Array, tokens: Array) -> None:
    torch = pytest.importorskip("torch")
    wide = torch.from_numpy(p.astype(np.float64))
    expected = torch.nn.functional.cross_entropy(wide, torch.from_numpy(tokens), reduction="none")
    np.testing.assert_allclose(token_nll(p, tokens), expected.numpy(), rtol=1e-12, atol=1e-12)
