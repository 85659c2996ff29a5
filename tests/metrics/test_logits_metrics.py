"""`nll`'s kin: perplexity, divergence and the probability of answers, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from surgery.differential.effects import Scores, bounds
from surgery.evidence import Effect
from surgery.metrics import Observed, make_metric
from surgery.metrics.intervals import bootstrap_mean
from surgery.stimuli import Stimulus

NONE = np.empty(0)


def test_perplexity_is_the_geometric_mean_of_one_over_p() -> None:
    nll = -np.log([1 / 2, 1 / 8])
    assert make_metric("perplexity").score(Observed((), (), nll)) == pytest.approx(4)


def test_a_perplexity_beyond_float64_is_infinite_and_so_never_passes() -> None:
    assert make_metric("perplexity").score(Observed((), (), np.array([1e4]))) == math.inf


def test_a_change_of_perplexity_is_a_ratio_less_one() -> None:
    corners = {"T_o": 20.0, "T_e": 22.0, "R_o": 20.0, "R_e": 19.0}
    effect = Effect("perplexity", "target", 9, corners, "perplexity", relative=True)
    assert effect.change("T") == pytest.approx(0.1)
    assert effect.change("R") == pytest.approx(-0.05)
    assert effect.step("T_e", "R_e") == pytest.approx(19 / 22 - 1)
    nothing = Effect("perplexity", "target", 9, {"T_o": 0.0, "T_e": 1.0}, "", relative=True)
    assert math.isnan(nothing.change("T")) and math.isnan(nothing.change("R"))


def test_the_interval_of_a_ratio_is_that_of_its_logarithm() -> None:
    generator = np.random.default_rng(0)
    nll = generator.gamma(2.0, 1.0, (2, 10))
    weights = np.arange(1.0, 11.0)
    totals = np.exp((nll * weights).sum(axis=1) / weights.sum())
    before, after = (
        Scores(float(total), np.exp(own), weights) for total, own in zip(totals, nll, strict=True)
    )
    logs = bootstrap_mean((nll[1] - nll[0]) * weights, weights, 0.95)
    assert logs is not None
    found = bounds(make_metric("perplexity"), before, after, 0.95)
    assert found == pytest.approx([math.expm1(bound) for bound in logs])


def test_a_divergence_that_is_zero_everywhere_is_certain() -> None:
    """It is no rate of which 0 of 10 says little."""
    zero = Scores(0.0, np.zeros(10), np.full(10, 3.0))
    assert bounds(make_metric("kl"), zero, zero, 0.95) == (0, 0)


def test_kl_is_a_mean_over_positions() -> None:
    found = make_metric("kl").score(Observed((), (), NONE, np.array([0.1, 0.2, 0.6])))
    assert found == pytest.approx(0.3)


def test_the_best_answer_counts_by_its_mean_token() -> None:
    answers = {"right": ("Rome", "the city of Rome"), "wrong": ("Oslo",)}
    stimuli = (
        Stimulus("a", "target", prompt="?", answers=answers),
        Stimulus("b", "target", prompt="?", answers={"right": ("Lima",)}),
        Stimulus("c", "target", prompt="?"),
    )
    known = (
        {"Rome": (-3.0,), "the city of Rome": (-4.0, -1.0, -0.5, -0.5), "Oslo": (-0.1,)},
        {"Lima": (-2.0, -1.0)},
        {},
    )
    observed = Observed(stimuli, ("", "", ""), NONE, NONE, known)
    assert make_metric("answer_logprob:right").score(observed) == (-1.5 - 1.5) / 2
    assert make_metric("answer_logprob:wrong").score(observed) == -0.1
    assert make_metric("answer_logprob:right").asks(stimuli[0]) == ("Rome", "the city of Rome")


def test_an_answer_that_was_not_run_is_no_number() -> None:
    stimulus = Stimulus("a", "target", prompt="?", answers={"x": ("Rome", "Roma")})
    for known in ({}, {"Roma": (-1.0,)}, {"Rome": (-1.0,)}, {"Rome": (-1.0,), "Roma": ()}):
        observed = Observed((stimulus,), ("",), NONE, NONE, (known,))
        assert math.isnan(make_metric("answer_logprob:x").score(observed))
