"""A clean conversion of a clean edit passes: a false alarm would teach people to look away."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from differential.lab import Lab
from models import FAMILIES

from surgery import pipeline
from surgery.checkpoint import Checkpoint
from surgery.evidence import PAIRS
from surgery.policy import load_policy

MODELS = [*((family, "float32") for family in FAMILIES), ("llama", "bfloat16")]


@pytest.mark.parametrize(("family", "dtype"), MODELS)
def test_a_clean_pair_passes(lab: Lab, family: str, dtype: str) -> None:
    report = lab.diff(lab.case(family, dtype))
    assert (report.verdict, list(report.findings)) == ("pass", [])
    assert set(report.corners) == {"T_o", "R_o"}


@pytest.mark.parametrize(("family", "dtype"), MODELS)
def test_a_clean_edit_passes_on_all_four_corners(lab: Lab, family: str, dtype: str) -> None:
    report = lab.diff_edited(lab.case(family, dtype))
    assert (report.verdict, list(report.findings)) == ("pass", [])
    evidence = report.evidence()
    assert {row.edge for row in evidence.conversion} == {"C_o", "C_e"}
    assert {row.stimulus_set for row in evidence.interaction} == {"target", "preserve", "probe"}
    assert all(row.effect > 1000 * row.noise for row in evidence.interaction), "no edit to lose"


def test_bfloat16_weights_stay_bfloat16_on_disk(lab: Lab) -> None:
    """Else the test above proves nothing about them."""
    tensors = Checkpoint.open(lab.case("llama", "bfloat16").model).tensors
    assert {info.dtype for info in tensors.values()} == {"BF16"}


def test_what_is_compared_is_counted(lab: Lab) -> None:
    """Every real position of prompts and probes, every logit, every embedding row."""
    evidence = lab.diff(lab.case("llama")).evidence()
    [row] = evidence.conversion
    holes, masked_row = 11 + 5 + 7, 7 + 0 + 5
    prompts, probes = 21, 1 + 5 + 5 * 13 + 2 * (17 + 12 + 7) + holes + masked_row + 64
    assert row.positions == evidence.compared == prompts + probes
    assert row.elements == row.positions * 200
    assert evidence.covered_rows == 200


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(lab: Lab) -> None:
    case = lab.case("gpt2")
    first, again, other = (lab.diff(case, seed=seed) for seed in (0, 0, 1))
    assert first.conversion == again.conversion
    assert first.inputs["workload"] == again.inputs["workload"]
    assert first.inputs["workload"]["sha256"] != other.inputs["workload"]["sha256"]
    assert first.conversion != other.conversion


def test_prompts_of_one_token_are_no_fault(lab: Lab, tmp_path: Path) -> None:
    """They have no next token, so there is no likelihood of it to miss."""
    from differential.lab import write_stimuli

    stimuli = write_stimuli(tmp_path / "one.jsonl", {"target": ((7,), (9,))})
    assert lab.diff_edited(lab.case("llama"), stimuli=[stimuli]).verdict == "pass"


def test_children_come_to_the_same_numbers_as_this_process(lab: Lab) -> None:
    """What lets the other tests here run without children."""
    case = lab.case("bert")
    report = pipeline.diff(case.model, onnx=case.onnx, stimuli=[lab.stimuli])
    here = lab.diff(case)
    assert report.verdict == "pass"
    measured = [r.evidence().conversion[0] for r in (report, here)]
    np.testing.assert_allclose(*(row.noise_l2 for row in measured), rtol=0.2)
    np.testing.assert_allclose(*(row.ratio_l2 for row in measured), rtol=0.2)


def test_a_run_measures_every_pair_on_every_set_and_judges_with_confidence(
    lab: Lab, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    lines = [
        {
            "id": f"{name} {n}",
            "set": name,
            "input_ids": generator.integers(1, 190, 4 + n % 3).tolist(),
        }
        for name in ("target", "preserve")
        for n in range(9)
    ]
    stimuli = tmp_path / "stimuli.jsonl"
    stimuli.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    policy = tmp_path / "policy.yaml"
    rule = "{metric: nll, min_change: -9, max_change: 9, confidence: 0.9}"
    policy.write_text(
        "schema: 1\npreserve: {max_kl: 9, max_real_flip_rate: 1, max_log_ratio: 9, confidence: 0.9}"
        f"\ntarget: [{rule}]\n"
    )
    report = lab.diff_edited(lab.case("gpt2"), stimuli=[stimuli], policy=load_policy(policy))
    assert report.verdict == "pass", report.findings
    rows = {(row.stimulus_set, row.pair): row for row in report.divergence}
    assert set(rows) == {(s, p) for s in ("target", "preserve", "probe") for p in PAIRS}
    assert {i.confidence for i in report.intervals} == {0.9, 0.95, 0.99}
    for drift in report.drift:
        row = rows[drift.stimulus_set, drift.runtime]
        assert row.kl["mean"] == pytest.approx(drift.kl)
        assert row.flips / row.positions == pytest.approx(drift.flip_rate)
    for (_, pair), row in rows.items():
        if pair.startswith("C"):
            assert row.kl["min"] >= 0 and row.kl["max"] < 1e-9
            assert abs(row.perplexity["log_ratio"]) < 1e-5
            assert row.flips == row.near_ties, "a clean conversion turns nothing but ties"
        else:
            assert row.kl["mean"] > 1e-6
