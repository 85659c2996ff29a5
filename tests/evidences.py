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
    Evidence,
    Finding,
    Interaction,
)
from surgery.gate import judge
from surgery.policy import Policy, PreservePolicy, TargetRule
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
    )


def conversion_only() -> Evidence:
    """What `diff` without an edited model measures."""
    return Evidence(
        corners={name: corner(name) for name in ("T_o", "R_o")},
        conversion=(conversion("C_o"),),
        compared=1234,
        covered_rows=512,
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
