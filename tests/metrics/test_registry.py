"""The metrics a policy can name: each keeps the contract, and no other name is taken."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest

from surgery.differential.behaviour import Tokens
from surgery.differential.effects import Seen, bounds, score
from surgery.errors import PolicyError
from surgery.metrics import METRICS, Metric, Observed, make_metric
from surgery.metrics.interface import Needs
from surgery.stimuli import Stimulus

NAMES = {
    "answer_logprob": "answer_logprob:yes",
    "answer_rate": "answer_rate:yes",
    "exact_match": "exact_match:yes",
    "kl": "kl",
    "line_pass_rate": "line_pass_rate:en,ru",
    "nll": "nll",
    "perplexity": "perplexity",
    "word_pass_rate": "word_pass_rate:en,ru",
    "word_rate": "word_rate:bad",
}
"""A name with an argument for every registered metric: a new one must be added here."""

RUSSIAN = "Столицей этой большой страны является город Москва"
ANSWERS = {"yes": ("yes", "да"), "language": ("ru",)}
STIMULI = tuple(Stimulus(f"{n:02}", "target", prompt="?", answers=ANSWERS) for n in range(12))


def seen(good: int) -> Seen:
    """A corner that does well on the first `good` texts."""
    generator = np.random.default_rng(good)
    rows = [stimulus.id for n, stimulus in enumerate(STIMULI) for _ in range(1 + n % 3)]
    nll = generator.gamma(2.0, 1.0, len(rows)) - 0.01 * good
    said = ["yes" if n < good else "bad yes" if n % 2 else RUSSIAN + " hello" for n in range(12)]
    said = [RUSSIAN if n < good and n % 2 else text for n, text in enumerate(said)]
    answers = {
        s.id: {"yes": (-1.0 - n * good / 10, -0.5), "да": (-3.0,)} for n, s in enumerate(STIMULI)
    }
    responses = {stimulus.id: text for stimulus, text in zip(STIMULI, said, strict=True)}
    return Seen(responses, answers, Tokens([nll], rows), Tokens([0.01 * nll], rows))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_keeps_the_contract(name: str) -> None:
    metric = make_metric(NAMES[name])
    assert isinstance(metric, Metric)
    assert metric.unit
    assert metric.needs in get_args(Needs)
    assert metric.new_tokens(3) >= 0
    assert math.isnan(metric.score(Observed((), (), np.empty(0)))), "nothing is not a number"


@pytest.mark.parametrize("name", METRICS)
def test_what_a_metric_reads_it_asks_for(name: str) -> None:
    metric = make_metric(NAMES[name])
    assert (metric.new_tokens(1) > 0) is (metric.needs == "responses")
    assert bool(metric.asks(STIMULI[0])) is (metric.needs == "answer_logprobs")


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_the_same_again_and_has_an_interval(name: str) -> None:
    """Each is a mean over texts, a relative one of its logarithm."""
    found = [_change(NAMES[name]) for _ in range(2)]
    assert found[0] == found[1]
    change, low, high = found[0]
    assert low <= change <= high and low < high


def _change(name: str) -> tuple[float, float, float]:
    metric = make_metric(name)
    before, after = (score(metric, STIMULI, seen(good)) for good in (3, 8))
    interval = bounds(metric, before, after, 0.9)
    assert interval is not None
    assert math.isfinite(before.total) and math.isfinite(after.total)
    change = after.total / before.total - 1 if metric.relative else after.total - before.total
    return (change, *interval)


@pytest.mark.parametrize("name", METRICS)
def test_the_order_of_texts_changes_nothing(name: str) -> None:
    metric = make_metric(NAMES[name])
    one, other = (score(metric, texts, seen(5)) for texts in (STIMULI, STIMULI[::-1]))
    assert one.total == pytest.approx(other.total, rel=1e-14)
    assert (one.scores == other.scores).all() and (one.weights == other.weights).all()


@pytest.mark.parametrize("name", METRICS)
def test_what_is_missing_is_no_number(name: str) -> None:
    """A corner whose numbers did not come is not taken for one that does well."""
    metric = make_metric(NAMES[name])
    if metric.needs != "responses":
        assert math.isnan(score(metric, STIMULI, Seen()).total)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("anwser_rate:x", "unknown metric 'anwser_rate'; did you mean 'answer_rate'?"),
        ("zzz", f"unknown metric 'zzz'; known: {', '.join(NAMES)}"),
        ("answer_rate", "metric 'answer_rate' needs an argument, as in answer_rate:NAME"),
        ("answer_rate:", "metric 'answer_rate' needs an argument, as in answer_rate:NAME"),
        ("word_rate", "metric 'word_rate' needs an argument, as in word_rate:NAME"),
        ("word_rate:bad.txt", "word_rate:bad.txt: names a file"),
        ("word_rate:***", "word_rate: '***' has no letter or digit to look for"),
        ("word_pass_rate:a.txt,b.txt", "word_pass_rate:a.txt,b.txt: names a file"),
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
    observed = Observed(stimuli, responses, np.empty(0))
    assert make_metric("line_pass_rate:en,fr").score(observed) == 1
    assert make_metric("line_pass_rate:de,en").score(observed) == 0


@pytest.mark.parametrize("name", ["line_pass_rate:en,ru", "word_pass_rate:en,ru"])
def test_the_detector_is_named(name: str) -> None:
    method = make_metric(name).method
    assert method.startswith("py3langid 0.")
    assert "normalised probabilities, languages en, ru" in method


def test_listing_metrics_imports_none_of_them() -> None:
    code = (
        "import sys; from surgery.metrics import METRICS; list(METRICS); 'nll' in METRICS\n"
        "assert 'surgery.metrics.nll' not in sys.modules, 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
