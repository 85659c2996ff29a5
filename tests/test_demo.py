"""`surgery demo`: three real edits pass the four corners, and a planted fault does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery import api
from surgery.demo import CASES
from surgery.report import Report, load_report


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder the demo wrote and everything it printed."""
    output, printed = tmp_path_factory.mktemp("demo") / "out", []
    assert api.demo(output, show=printed.append)
    return output, "\n".join(printed)


def effect(report: Report, metric: str, stimulus_set: str) -> dict[str, float]:
    (found,) = [e for e in report.effects if (e.metric, e.stimulus_set) == (metric, stimulus_set)]
    return {runtime: found.change(runtime) for runtime in ("T", "R")}


def report_of(demo: tuple[Path, str], name: str) -> Report:
    return load_report(demo[0] / name / "report.json")


def test_a_zeroed_head_brings_40_points_of_memory_at_no_cost_to_plain_questions(
    demo: tuple[Path, str],
) -> None:
    report = report_of(demo, "remember")
    assert report.verdict == "pass"
    assert min(effect(report, "answer_rate:remembered", "target").values()) >= 0.40
    assert min(effect(report, "answer_rate:remembered", "preserve").values()) >= -0.05


def test_at_most_2_percent_of_neurons_bring_20_points_of_lines_in_the_right_language(
    demo: tuple[Path, str],
) -> None:
    report = report_of(demo, "unconfuse")
    assert report.verdict == "pass"
    assert min(effect(report, "line_pass_rate:en,de,fr,ru,ar", "target").values()) >= 0.20
    assert max(effect(report, "nll", "preserve").values()) <= 0.0953  # ln 1.1: 10% perplexity


def test_removed_features_stop_the_copying_of_stated_capitals(demo: tuple[Path, str]) -> None:
    report = report_of(demo, "sae-z")
    assert report.verdict == "pass"
    assert max(effect(report, "answer_rate:stated", "target").values()) <= -0.25


def test_the_planted_stale_tensor_fails_the_gate_and_is_named(demo: tuple[Path, str]) -> None:
    report = report_of(demo, "damaged")
    tensor = "transformer.h.0.attn.c_proj.weight"
    assert report.verdict == "fail"
    assert ("lineage", f"R_e/{tensor}") in {(f.stage, f.site) for f in report.findings}
    # Without lineage the numbers tell as well: the edit was lost on the way.
    lost = [f for f in report.findings if f.stage == "interaction"]
    assert "the edit was lost" in lost[0].message
    assert not [f for f in report.findings if f.site.startswith("C_o")]


def test_every_edited_checkpoint_of_the_demo_verifies(demo: tuple[Path, str]) -> None:
    root = Path(__file__).resolve().parent.parent / "fixtures"
    for case in CASES:
        fixture = root / case.fixture
        recipe = fixture / f"{case.recipe}.yaml"
        assert api.verify(demo[0] / case.recipe / "edited", base=fixture, recipe=recipe).ok


def test_the_demo_shows_behaviour_corners_verdict_and_where_the_reports_are(
    demo: tuple[Path, str],
) -> None:
    folder, text = demo
    assert text.count("PASS: edit and conversion are within the policy") == 3
    for shown in ("T_o", "T_e", "R_o", "R_e", "C_o", "C_e", "answer_rate:remembered", "FAIL"):
        assert shown in text
    for case in CASES:
        assert str(folder / case.recipe / "report.html") in text
        assert (folder / case.recipe / "report.html").is_file()
