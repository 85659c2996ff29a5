"""A metric whose changes are shares of what it was is judged by shares, with its A/A too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from behaviours import behaved, interval
from evidences import report

from surgery.evidence import Effect, Evidence
from surgery.gate import judge
from surgery.gate.behaviour import between_runtimes
from surgery.policy import Policy, TargetRule
from surgery.report import load_report, render

CORNERS = {"T_o": 20.0, "T_e": 22.0, "R_o": 20.0, "R_e": 22.2}
METHOD = "a way to count 1.2"


def measured(**corners: float) -> Evidence:
    """A perplexity of 20 that rises by 10%, and by 11% in ONNX Runtime."""
    own = Effect("perplexity", "preserve", 54, {**CORNERS, **corners}, "perplexity", METHOD, True)
    evidence = behaved()
    rows = tuple(
        interval("perplexity", "preserve", pair, 0.08, change, 0.12)
        for pair, change in (("T", 0.1), ("R", 0.11))
    )
    effects, intervals = (*evidence.effects, own), (*evidence.intervals, *rows)
    return replace(evidence, effects=effects, intervals=intervals)


def asked(limit: float, confidence: float | None = None) -> Policy:
    rule = TargetRule(metric="perplexity", set="preserve", max_change=limit, confidence=confidence)
    return Policy(schema=1, target=(rule,))


@pytest.mark.parametrize(("limit", "verdict"), [(0.115, "pass"), (0.105, "fail"), (0.09, "fail")])
def test_the_limit_is_on_the_ratio(limit: float, verdict: str) -> None:
    assert judge(measured(), asked(limit)).verdict == verdict


def test_the_difference_between_runtimes_is_a_ratio_too() -> None:
    [rule] = asked(1.0).target
    assert between_runtimes(measured(), rule) == pytest.approx(22.2 / 22 - 1)
    # 0.12 and 0.0091 of A/A
    assert judge(measured(), asked(0.130, 0.95)).verdict == "pass"
    assert judge(measured(), asked(0.128, 0.95)).verdict == "fail"


@pytest.mark.parametrize("nothing", [0.0, float("nan"), float("inf")])
def test_a_share_of_nothing_never_passes(nothing: float) -> None:
    assert judge(measured(T_o=nothing), asked(1e9)).verdict == "fail"


def test_a_report_keeps_it_and_shows_it_as_percent(tmp_path: Path) -> None:
    own = report(measured())
    path = tmp_path / "report.json"
    path.write_text(own.dump())
    assert load_report(path).evidence().effects == measured().effects
    for format in ("text", "md", "html"):
        shown = render(own, format)
        assert "+10.00%" in shown and "+11.00%" in shown, format
    assert METHOD in render(own, "md") and METHOD in render(own, "html")
