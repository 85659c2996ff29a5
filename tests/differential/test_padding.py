"""Padding between real tokens and rows of nothing else: damage is seen, and nothing is made up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from differential import mutants
from differential.lab import Lab, finding

Plant = Callable[..., Path]


def test_a_mask_without_its_holes_is_seen_there(lab: Lab, plant: Plant) -> None:
    """It is right on every prompt, and on padding on either side."""
    case = lab.case("llama")
    report = lab.diff(case, onnx=plant(case.onnx, mutants.fill_holes))
    wrong = finding(report, "conversion", "wrong value")
    assert wrong.site.startswith("C_o/logits/batch 3, holes, row "), "not where padding is right"


def test_nan_that_a_masked_row_spreads_is_a_finding(lab: Lab, plant: Plant) -> None:
    case = lab.case("llama")
    spread = partial(mutants.nan_in_masked_rows, spread=True)
    report = lab.diff(case, onnx=plant(case.onnx, spread))
    assert finding(report, "run", "nan").site == "R_o/logits/probe/batch 3, a masked row"


def test_nan_in_a_masked_row_alone_is_none(lab: Lab, plant: Plant) -> None:
    """What a row that may attend to nothing gives is nobody's fault: 0, a mean or NaN."""
    case = lab.case("llama")
    report = lab.diff(case, onnx=plant(case.onnx, mutants.nan_in_masked_rows))
    assert (report.verdict, list(report.findings)) == ("pass", [])
