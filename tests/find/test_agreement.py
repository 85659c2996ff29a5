"""Spearman's rank correlation against scipy's own, and what it says of nothing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from surgery.find.scores.agreement import rank_correlation

SCORES = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=20)


@given(SCORES)
def test_it_is_scipys_with_ties(pairs: list[tuple[int, int]]) -> None:
    one, other = zip(*pairs, strict=True)
    if len(set(one)) > 1 and len(set(other)) > 1:
        assert rank_correlation(one, other) == pytest.approx(float(spearmanr(one, other)[0]))
    else:
        assert math.isnan(rank_correlation(one, other))


def test_of_one_candidate_or_none_it_says_nothing() -> None:
    assert math.isnan(rank_correlation([1.0], [2.0]))
    assert math.isnan(rank_correlation([], []))
