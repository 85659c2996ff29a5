"""nll is the mean over the tokens, and of no token it is not a number."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.metrics import Observed, make_metric
from surgery.stimuli import Stimulus


def score(values: list[float]) -> float:
    return make_metric("nll").score(Observed((), (), np.array(values)))


@given(st.lists(st.floats(0, 50), min_size=1))
def test_nll_is_the_mean_over_tokens(values: list[float]) -> None:
    assert score(values) == pytest.approx(sum(values) / len(values))


def test_nll_of_no_token_is_not_a_number() -> None:
    assert math.isnan(score([]))


def test_one_nan_makes_the_mean_nan() -> None:
    assert math.isnan(score([1.0, math.nan]))


def test_nll_applies_to_every_stimulus_and_needs_no_response() -> None:
    metric = make_metric("nll")
    assert metric.applies(Stimulus("a", "preserve", input_ids=(1,)))
    assert metric.new_tokens(5) == 0
