"""Metrics of other packages: found by name, after our own, and named where they are broken."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from surgery.errors import EnvironmentFault, PolicyError
from surgery.metrics import METRICS, Observed, known_metrics, make_metric
from surgery.metrics.nll import NegativeLogLikelihood
from surgery.stimuli import Stimulus

CODE = """
from surgery.metrics.interface import Metric

class Politeness(Metric):
    unit = "share of responses"
    needs = "responses"

    def __init__(self, word):
        if word == "boom":
            raise RuntimeError("no such word")
        self.word = word

    def new_tokens(self, longest_answer):
        return 5

    def applies(self, stimulus):
        return True

    def score(self, observed):
        said = [self.word in response for response in observed.responses]
        return sum(said) / len(said) if said else float("nan")

class Half(Metric):
    unit = "share"
    needs = "responses"

class Unknown(Politeness):
    needs = "weights"

class Unitless(Politeness):
    unit = None

NOTHING = 7
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install(distribution, name=value, ...)`: an installed package with these entry points."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(distribution: str, **entries: str) -> None:
        module = f"{distribution}_code"
        (tmp_path / f"{module}.py").write_text(CODE)
        info = tmp_path / f"{distribution}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n"
        )
        lines = [f"{name} = {module}:{value}\n" for name, value in entries.items()]
        (info / "entry_points.txt").write_text(f"[surgery.metrics]\n{''.join(lines)}")

    yield make
    for name in [name for name in sys.modules if name.endswith("_code")]:
        del sys.modules[name]


def test_a_package_brings_a_metric(install: Install) -> None:
    install("courtesy", politeness="Politeness")
    metric = make_metric("politeness:please")
    stimuli = tuple(Stimulus(str(n), "target", prompt="?") for n in range(2))
    assert metric.score(Observed(stimuli, ("please", "no"), np.empty(0))) == 0.5
    assert metric.origin == "courtesy 1.2"
    assert "politeness" in known_metrics() and set(METRICS) <= set(known_metrics())


def test_it_is_listed_where_a_name_is_unknown(install: Install) -> None:
    install("courtesy", politeness="Politeness")
    with pytest.raises(PolicyError, match=r"known: .*, politeness, word_pass_rate"):
        make_metric("zzz")
    with pytest.raises(PolicyError, match=r"did you mean 'politeness'"):
        make_metric("politness:please")
    with pytest.raises(PolicyError, match=r"metric 'politeness' needs an argument"):
        make_metric("politeness")


def test_our_own_names_win(install: Install) -> None:
    install("courtesy", nll="Missing")
    assert isinstance(make_metric("nll"), NegativeLogLikelihood)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Missing", "AttributeError"),
        ("Half", "lacks applies, score"),
        ("NOTHING", "is no class of surgery.metrics.Metric"),
        ("Unknown", "needs one of responses, token_nll, kl, answer_logprobs"),
        ("Unitless", "has no unit"),
    ],
)
def test_a_broken_metric_names_its_package(install: Install, value: str, message: str) -> None:
    install("courtesy", politeness=value)
    with pytest.raises(EnvironmentFault, match=f"package courtesy 1.2 .*{message}"):
        make_metric("politeness:please")


def test_code_that_cannot_be_imported_or_called_names_its_package(
    install: Install, tmp_path: Path
) -> None:
    install("courtesy", politeness="Politeness", polite="Politeness")
    with pytest.raises(EnvironmentFault, match=r"package courtesy 1\.2 .*no such word"):
        make_metric("politeness:boom")
    install("rude", rudeness="Politeness")
    (tmp_path / "rude_code.py").write_text("import no_such_module_anywhere\n")
    with pytest.raises(EnvironmentFault, match=r"package rude 1\.2 .*ModuleNotFoundError"):
        make_metric("rudeness:x")


def test_a_name_of_two_packages_is_neither(install: Install) -> None:
    install("courtesy", politeness="Politeness")
    install("manners", politeness="Politeness")
    with pytest.raises(EnvironmentFault, match=r"is in courtesy 1\.2 and manners 1\.2"):
        make_metric("politeness:please")


def test_a_name_that_other_figures_have_is_refused(install: Install) -> None:
    install("courtesy", flip_rate="Politeness")
    with pytest.raises(EnvironmentFault, match=r"other figures of a report have"):
        make_metric("flip_rate:x")
