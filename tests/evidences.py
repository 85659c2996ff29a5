"""Evidence as a differential run would measure it: clean, and one way wrong at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from surgery.evidence import (
    CORNERS,
    Conversion,
    Corner,
    Drift,
    Effect,
    ErrorShape,
    Evidence,
    Finding,
    Interaction,
    Repeat,
    Tolerance,
)
from surgery.gate import judge
from surgery.policy import Policy, PreservePolicy, TargetRule
from surgery.presets import PRESETS
from surgery.report.model import Report

POLICY = Policy(
    schema=1,
    preserve=PreservePolicy(max_kl=0.01, max_flip_rate=0.01),
    target=(
        TargetRule(metric="memory_rate", min_change=0.3),
        TargetRule(metric="context_rate", max_change=-0.3),
    ),
)


def conversion(edge: str, ratio: float = 1.3, **changes: Any) -> Conversion:
    row = Conversion(
        edge=edge,
        output="logits",
        positions=4096,
        elements=4096 * 512,
        max_abs=1.6e-5 * ratio,
        mean_abs=1.7e-6,
        max_rel=3e-4,
        mean_rel=2e-6,
        cosine=0.999999998,
        kl=1.2e-9,
        flips=0,
        noise_max=1.6e-5,
        noise_l2=4.2e-4,
        ratio_max=ratio,
        ratio_l2=ratio * 0.9,
        ratio_position=ratio * 0.9,
        worst="left-padded batch, row 3, position 17",
    )
    return replace(row, **changes)


def shape(edge: str, sigma_ratio: float = 1.1, **changes: Any) -> ErrorShape:
    row = ErrorShape(
        edge=edge,
        output="logits",
        dtype="float32",
        elements=4096 * 512,
        overlap=0.997,
        sigma_ratio=sigma_ratio,
        noise_mean=-0.002,
        noise_sigma=1.0,
        noise_median=0.66,
        noise_p99=2.6,
        noise_max=5.2,
        error_mean=0.004,
        error_sigma=sigma_ratio,
        error_median=0.7,
        error_p99=2.9,
        error_max=5.6,
    )
    return replace(row, **changes)


def tolerance(edge: str, **changes: Any) -> Tolerance:
    """Of logits that a few fixed tolerances are too tight for."""
    outside = dict.fromkeys(PRESETS, 0) | {"issta-text": 1_900_000, "optimum": 12}
    row = Tolerance(edge, "logits", 4096 * 512, float("inf"), 2.1e-5, 1.8e-5, outside)
    return replace(row, **changes)


def repeat(corner: str, variant: str, kind: str = "run", **changes: Any) -> Repeat:
    row = Repeat(
        corner=corner,
        variant=variant,
        kind=kind,
        output="logits",
        positions=4096,
        nonfinite=0,
        max_abs=1.1e-5,
        l2=4.4e-4,
        median=0.4,
        p99=2.2,
        max=4.4,
        ratio_max=0.7,
        ratio_l2=1.05,
    )
    return replace(row, **changes)


def interaction(
    stimulus_set: str, effect: float, ratio: float, rho: float = 0.0, noise: float = 4e-4
) -> Interaction:
    norm = effect * ratio
    return Interaction(
        stimulus_set, "logits", effect, norm, ratio, rho, noise, norm / noise if noise else norm
    )


def corner(name: str, status: str = "ok") -> Corner:
    runtime = {"T": "torch float32", "R": "onnxruntime CPUExecutionProvider"}[name[0]]
    model = {"o": "capitals", "e": "capitals, edited"}[name[2]]
    return Corner(runtime, model, status, 1.32, 310 << 20, 12)


def effect(metric: str, stimulus_set: str, *values: float, unit: str = "share") -> Effect:
    return Effect(metric, stimulus_set, 54, dict(zip(CORNERS, values, strict=True)), unit)


def clean() -> Evidence:
    """All four corners, nothing wrong."""
    return Evidence(
        corners={name: corner(name) for name in CORNERS},
        conversion=(conversion("C_o"), conversion("C_e", 1.4)),
        interaction=(
            interaction("target", 84.2, 3e-6),
            interaction("preserve", 2.1e-3, 0.2),
        ),
        effects=(
            effect("memory_rate", "target", 0.40, 0.98, 0.40, 0.98),
            effect("context_rate", "target", 0.55, 0.01, 0.55, 0.01),
            effect("accuracy", "preserve", 1.0, 1.0, 1.0, 1.0),
            effect("logit_difference", "target", -1.3, 4.6, -1.3, 4.6, unit="logits"),
        ),
        drift=(
            Drift("preserve", "T", 812, 3.1e-3, 0.0025),
            Drift("preserve", "R", 812, 3.1e-3, 0.0025),
        ),
        compared=8_388_608,
        covered_rows=512,
        shapes=(shape("C_o"), shape("C_e")),
        tolerances=(tolerance("C_o"), tolerance("C_e")),
        repeats=(
            repeat("T_o", "attention eager"),
            repeat("T_o", "computed in float16", "compute", max_abs=0.021, ratio_max=1310.0),
            repeat("R_e", "optimisation disabled"),
        ),
    )


def conversion_only() -> Evidence:
    """What `diff` without an edited model measures."""
    return Evidence(
        corners={name: corner(name) for name in ("T_o", "R_o")},
        conversion=(conversion("C_o"),),
        compared=1234,
        covered_rows=512,
        shapes=(shape("C_o"),),
        tolerances=(tolerance("C_o"),),
    )


def edit_lost() -> Evidence:
    """The edited model's ONNX file holds the unedited weights, and its name is hostile."""
    name = "h.2.attn.c_proj.weight|<script>alert(1)</script>\x1b[31m\ud800"
    return replace(
        clean(),
        conversion=(conversion("C_o"), conversion("C_e", 4.1e5)),
        interaction=(
            interaction("target", 84.2, 0.997, rho=-0.995),
            interaction("preserve", 2.1e-3, 0.2),
        ),
        effects=(
            effect("memory_rate", "target", 0.40, 0.98, 0.40, 0.41),
            effect("context_rate", "target", 0.55, 0.01, 0.55, 0.55),
        ),
        drift=(
            Drift("preserve", "T", 812, 3.1e-3, 0.0025),
            Drift("preserve", "R", 812, float("nan"), 0.0025),
        ),
        faults=(Finding("lineage", "stale tensor", name, f"{name} holds unedited values"),),
    )


def report(evidence: Evidence, policy: Policy = POLICY) -> Report:
    return Report.build(
        evidence,
        judge(evidence, policy),
        policy,
        environment={"surgery": "0.1.0", "cpu": "any", "threads": "2"},
        inputs={
            "model": {"path": "fixtures/capitals", "sha256": "9f" * 32},
            "onnx": {"path": "out/<b>onnx</b>/model.onnx", "sha256": "5b" * 32},
        },
    )
