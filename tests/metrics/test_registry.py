"""The metrics a policy can name: each keeps the contract, and no other name is taken."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from surgery.errors import PolicyError
from surgery.metrics import METRICS, Metric, Observed, make_metric
from surgery.stimuli import Stimulus

NAMES = {"answer_rate": "answer_rate:x", "line_pass_rate": "line_pass_rate:en,fr", "nll": "nll"}
"""A name with an argument for every registered metric: a new one must be added here."""


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_keeps_the_contract(name: str) -> None:
    metric = make_metric(NAMES[name])
    assert isinstance(metric, Metric)
    assert metric.unit
    assert metric.needs in ("responses", "token_nll")
    assert metric.new_tokens(3) >= 0
    assert math.isnan(metric.score(Observed((), (), np.empty(0)))), "nothing is not a number"


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_that_needs_responses_asks_for_tokens(name: str) -> None:
    metric = make_metric(NAMES[name])
    assert (metric.new_tokens(1) > 0) is (metric.needs == "responses")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("anwser_rate:x", "unknown metric 'anwser_rate'; did you mean 'answer_rate'?"),
        ("zzz", "unknown metric 'zzz'; known: answer_rate, line_pass_rate, nll"),
        ("answer_rate", "metric 'answer_rate' needs an argument, as in answer_rate:NAME"),
        ("answer_rate:", "metric 'answer_rate' needs an argument, as in answer_rate:NAME"),
        ("nll:x", "metric 'nll' takes no argument"),
        ("line_pass_rate:en,xx", "line_pass_rate:en,xx: Unknown language code(s): {'xx'}"),
        ("", "unknown metric ''"),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_the_way_out(name: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make_metric(name)
    assert str(caught.value).startswith(message)


def test_line_pass_rate_takes_the_accepted_languages_from_the_stimuli() -> None:
    stimuli = (
        Stimulus("a", "target", prompt="?", answers={"language": ("fr",)}),
        Stimulus("b", "target", prompt="?"),
    )
    responses = ("La capitale de la France est une grande et belle ville.", "unjudged")
    seen = Observed(stimuli, responses, np.empty(0))
    assert make_metric("line_pass_rate:en,fr").score(seen) == 1
    assert make_metric("line_pass_rate:de,en").score(seen) == 0


def test_listing_metrics_imports_none_of_them() -> None:
    code = (
        "import sys; from surgery.metrics import METRICS; list(METRICS); 'nll' in METRICS\n"
        "assert 'surgery.metrics.nll' not in sys.modules, 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
