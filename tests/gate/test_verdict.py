"""The gate's law, case by case, and what must hold for any evidence."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
from evidences import (
    POLICY,
    clean,
    conversion,
    conversion_only,
    corner,
    edit_lost,
    effect,
    interaction,
    repeat,
    shape,
    tolerance,
)
from hypothesis import given
from hypothesis import strategies as st

from surgery.evidence import (
    Conversion,
    Drift,
    ErrorShape,
    Evidence,
    Finding,
    Interaction,
    Repeat,
    Tolerance,
)
from surgery.gate import judge
from surgery.policy import BUILT_IN, Policy, PreservePolicy, TargetRule
from surgery.presets import PRESETS

NAN, INF = math.nan, math.inf


def without(evidence: Evidence, name: str) -> Evidence:
    return replace(evidence, corners={k: v for k, v in evidence.corners.items() if k != name})


def drifts(runtime: str, kl: float = 0.0, flip_rate: float = 0.0) -> tuple[Drift, ...]:
    other = "R" if runtime == "T" else "T"
    return (Drift("preserve", runtime, 9, kl, flip_rate), Drift("preserve", other, 9, 0.0, 0.0))


def messages(evidence: Evidence, policy: Policy = BUILT_IN) -> str:
    return "; ".join(finding.message for finding in judge(evidence, policy).findings)


def test_clean_evidence_passes() -> None:
    assert judge(clean(), POLICY).verdict == "pass"
    assert judge(clean(), POLICY).findings == ()


def test_without_an_edit_only_the_conversion_is_judged() -> None:
    assert judge(conversion_only(), BUILT_IN).verdict == "pass"


def test_a_policy_about_an_edit_fails_where_no_edited_model_was_tested() -> None:
    verdict = judge(conversion_only(), POLICY)
    assert verdict.verdict == "fail"
    assert {finding.symptom for finding in verdict.findings} == {"not measured"}


def test_nothing_compared_is_not_evaluated() -> None:
    verdict = judge(replace(clean(), compared=0), POLICY)
    assert verdict.verdict == "not_evaluated"
    assert judge(Evidence(corners={}), BUILT_IN).verdict == "not_evaluated"


def test_a_crash_fails_even_where_nothing_was_compared() -> None:
    crashed = Evidence(corners={"T_o": corner("T_o"), "R_o": corner("R_o", "crash")})
    assert judge(crashed, BUILT_IN).verdict == "fail"


RULES = (TargetRule(metric="memory_rate", min_change=0.3),)

FAILING: dict[str, tuple[dict[str, Any], Policy, str, str, str]] = {
    "fault": (
        {"faults": (Finding("lineage", "stale tensor", "w", "stale"),)},
        BUILT_IN,
        "lineage",
        "stale tensor",
        "w",
    ),
    "no C_o": ({"conversion": (conversion("C_e"),)}, BUILT_IN, "coverage", "not measured", "C_o"),
    "no C_e": ({"conversion": (conversion("C_o"),)}, BUILT_IN, "coverage", "not measured", "C_e"),
    "no interaction": ({"interaction": ()}, BUILT_IN, "coverage", "not measured", "I"),
    "worst element": (
        {"conversion": (conversion("C_o", ratio_max=8.01), conversion("C_e"))},
        BUILT_IN,
        "conversion",
        "wrong value",
        "C_o/logits/left-padded batch, row 3, position 17",
    ),
    "L2": (
        {"conversion": (conversion("C_o"), conversion("C_e", ratio_l2=INF, worst="b"))},
        BUILT_IN,
        "conversion",
        "wrong value",
        "C_e/logits/b",
    ),
    "infinite noise": (
        {"conversion": (conversion("C_o", noise_max=INF, ratio_max=0.0), conversion("C_e"))},
        BUILT_IN,
        "conversion",
        "nan",
        "C_o/logits",
    ),
    "no elements": (
        {"conversion": (conversion("C_o", elements=0), conversion("C_e"))},
        BUILT_IN,
        "coverage",
        "nothing compared",
        "C_o/logits",
    ),
    "negative ratio": (
        {"conversion": (conversion("C_o", ratio_max=-1.0, worst="w"), conversion("C_e"))},
        BUILT_IN,
        "conversion",
        "wrong value",
        "C_o/logits/w",
    ),
    "edit lost": (
        {"interaction": (interaction("target", 84.2, 1.0, rho=-0.99),)},
        BUILT_IN,
        "interaction",
        "the edit was lost",
        "target/logits",
    ),
    "half lost": (
        {"interaction": (interaction("target", 84.2, 0.5, rho=-0.5),)},
        BUILT_IN,
        "interaction",
        "half lost",
        "target/logits",
    ),
    "applied twice": (
        {"interaction": (interaction("target", 84.2, 1.0, rho=1.1),)},
        BUILT_IN,
        "interaction",
        "applied twice",
        "target/logits",
    ),
    "another effect": (
        {"interaction": (interaction("target", 84.2, 0.3, rho=-0.25),)},
        BUILT_IN,
        "interaction",
        "wrong value",
        "target/logits",
    ),
    "disagreement within a small effect": (
        {"interaction": (interaction("preserve", 1e-3, 9.0),)},
        BUILT_IN,
        "interaction",
        "wrong value",
        "preserve/logits",
    ),
    "drift in PyTorch": (
        {"drift": drifts("T", kl=0.02)},
        POLICY,
        "preserve",
        "drift",
        "preserve/T/kl",
    ),
    "drift in ONNX Runtime": (
        {"drift": drifts("R", flip_rate=0.02)},
        POLICY,
        "preserve",
        "drift",
        "preserve/R/flip_rate",
    ),
    "drift not measured": (
        {"drift": drifts("T")[:1]},
        POLICY,
        "preserve",
        "not measured",
        "preserve/R/kl",
    ),
    "drift is NaN, without a limit": (
        {"drift": drifts("T", kl=NAN)},
        BUILT_IN,
        "preserve",
        "nan",
        "preserve/T/kl",
    ),
    "metric is NaN on one side": (
        {"effects": (effect("m", "probe", 1.0, 1.0, 1.0, NAN),)},
        BUILT_IN,
        "target",
        "nan",
        "probe/m/R_e",
    ),
    "metric not measured": (
        {"effects": ()},
        Policy(schema=1, target=RULES),
        "target",
        "not measured",
        "target/memory_rate/T",
    ),
    "too little change in one runtime": (
        {"effects": (effect("memory_rate", "target", 0.4, 0.9, 0.4, 0.6),)},
        Policy(schema=1, target=RULES),
        "target",
        "too little change",
        "target/memory_rate/R",
    ),
    "metric measured on nothing": (
        {"effects": (replace(effect("memory_rate", "target", 0.0, 1.0, 0.0, 1.0), count=0),)},
        Policy(schema=1, target=RULES),
        "target",
        "not measured",
        "target/memory_rate/R",
    ),
    "metric missing at a corner": (
        {"effects": (replace(clean().effects[0], corners={"T_o": 0.0, "T_e": 1.0, "R_e": 1.0}),)},
        Policy(schema=1, target=RULES),
        "target",
        "too little change",
        "target/memory_rate/R",
    ),
    "metric of another set": (
        {"effects": (effect("memory_rate", "preserve", 0.0, 1.0, 0.0, 1.0),)},
        Policy(schema=1, target=RULES),
        "target",
        "not measured",
        "target/memory_rate/T",
    ),
    "drift measured on nothing": (
        {"drift": (*drifts("T")[:1], Drift("preserve", "R", 0, 0.0, 0.0))},
        POLICY,
        "preserve",
        "not measured",
        "preserve/R/flip_rate",
    ),
    "too much change": (
        {"effects": (effect("context_rate", "target", 0.5, 0.1, 0.5, 0.21),)},
        Policy(schema=1, target=(TargetRule(metric="context_rate", max_change=-0.3),)),
        "target",
        "too much change",
        "target/context_rate/R",
    ),
    "too much loss": (
        {"effects": (effect("accuracy", "preserve", 1.0, 0.9, 1.0, 1.0),)},
        Policy(schema=1, target=(TargetRule(metric="accuracy", set="preserve", min_change=-0.05),)),
        "target",
        "too little change",
        "preserve/accuracy/T",
    ),
    "another distribution": (
        {"shapes": (shape("C_o", overlap=0.79, sigma_ratio=1.51), shape("C_e"))},
        BUILT_IN,
        "conversion",
        "wrong distribution",
        "C_o/logits",
    ),
    "no shape": (
        {"shapes": (shape("C_o"),)},
        BUILT_IN,
        "coverage",
        "not measured",
        "C_e/logits",
    ),
    "no tolerance": (
        {"tolerances": (tolerance("C_e"),)},
        BUILT_IN,
        "coverage",
        "not measured",
        "C_o/logits",
    ),
    "beyond the preset": (
        {},
        Policy.model_validate({"schema": 1, "conversion": {"preset": "optimum"}}),
        "tolerance",
        "beyond a fixed tolerance",
        "C_o/logits",
    ),
    "preset not measured": (
        {"tolerances": (tolerance("C_o", outside={}), tolerance("C_e"))},
        Policy.model_validate({"schema": 1, "conversion": {"preset": "polygraphy"}}),
        "coverage",
        "not measured",
        "C_o/logits",
    ),
    "another result of another run": (
        {"repeats": (repeat("R_o", "optimisation disabled", ratio_max=8.1),)},
        BUILT_IN,
        "run",
        "unstable",
        "R_o/logits/optimisation disabled",
    ),
    "a run of no kind": (
        {"repeats": (repeat("T_o", "attention eager", "x"),)},
        BUILT_IN,
        "run",
        "impossible",
        "T_o/logits/attention eager",
    ),
    "NaN in another run alone": (
        {"repeats": (repeat("R_o", "optimisation disabled", nonfinite=1),)},
        BUILT_IN,
        "run",
        "nan",
        "R_o/logits/optimisation disabled",
    ),
}


@pytest.mark.parametrize("case", FAILING)
def test_each_way_to_fail_is_named(case: str) -> None:
    changes, policy, stage, symptom, site = FAILING[case]
    verdict = judge(replace(clean(), **changes), policy)
    assert verdict.verdict == "fail"
    assert (stage, symptom, site) in [(f.stage, f.symptom, f.site) for f in verdict.findings]


IMPOSSIBLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "infinite error": ("conversion", {"max_abs": INF}, "C_o/logits"),
    "negative error": ("conversion", {"mean_abs": -1.0}, "C_o/logits"),
    "negative relative error": ("conversion", {"max_rel": -1.0}, "C_o/logits"),
    "negative divergence": ("conversion", {"kl": -1.0}, "C_o/logits"),
    "negative flips": ("conversion", {"flips": -1}, "C_o/logits"),
    "more flips than positions": ("conversion", {"flips": 4097}, "C_o/logits"),
    "cosine beyond 1": ("conversion", {"cosine": 1.01}, "C_o/logits"),
    "cosine beyond -1": ("conversion", {"cosine": -1.01}, "C_o/logits"),
    "negative noise": ("conversion", {"noise_max": -1.0}, "C_o/logits"),
    "an error over no noise": ("conversion", {"noise_max": 0.0}, "C_o/logits"),
    "an error over no L2 noise": ("conversion", {"noise_l2": 0.0}, "C_o/logits"),
    "unknown edge": ("conversion", {"edge": "C_x"}, "C_x/logits"),
    "negative effect": ("interaction", {"effect": -1.0}, "target/logits"),
    "negative interaction": ("interaction", {"norm": -1.0}, "target/logits"),
    "negative share": ("interaction", {"ratio": -1.0}, "target/logits"),
    "negative noise ratio": ("interaction", {"noise_ratio": -1.0}, "target/logits"),
    "infinite interaction": ("interaction", {"norm": INF}, "target/logits"),
    "infinite direction": ("interaction", {"rho": INF}, "target/logits"),
    "interaction over no noise": ("interaction", {"noise": 0.0}, "target/logits"),
    "negative count": ("effects", {"count": -1}, "target/memory_rate"),
    "metric of no corner": ("effects", {"corners": {"X": 0.0}}, "target/memory_rate"),
    "drift of no runtime": ("drift", {"runtime": "X"}, "preserve/X"),
    "negative drift": ("drift", {"kl": -1.0}, "preserve/T/kl"),
    "infinite drift": ("drift", {"kl": INF}, "preserve/T/kl"),
    "more flips than all": ("drift", {"flip_rate": 1.5}, "preserve/T/flip_rate"),
    "negative positions": ("drift", {"positions": -1}, "preserve/T/positions"),
    "overlap beyond 1": ("shapes", {"overlap": 1.01}, "C_o/logits"),
    "negative overlap": ("shapes", {"overlap": -0.01}, "C_o/logits"),
    "negative sigma": ("shapes", {"error_sigma": -1.0}, "C_o/logits"),
    "infinite noise": ("shapes", {"noise_sigma": INF}, "C_o/logits"),
    "infinite mean": ("shapes", {"error_mean": INF}, "C_o/logits"),
    "shape of nothing": ("shapes", {"elements": 0}, "C_o/logits"),
    "shape of no edge": ("shapes", {"edge": "C_x"}, "C_x/logits"),
    "negative tolerance": ("tolerances", {"atol": -1.0}, "C_o/logits"),
    "more beyond than all": ("tolerances", {"outside": {"optimum": 1 << 40}}, "C_o/logits"),
    "fewer beyond than none": ("tolerances", {"outside": {"optimum": -1}}, "C_o/logits"),
    "tolerance of no edge": ("tolerances", {"edge": "C_x"}, "C_x/logits"),
    "negative difference": ("repeats", {"max_abs": -1.0}, "T_o/logits/attention eager"),
    "infinite difference": ("repeats", {"l2": INF}, "T_o/logits/attention eager"),
    "run of no corner": ("repeats", {"corner": "X"}, "X/logits/attention eager"),
    "run at no position": ("repeats", {"positions": 0}, "T_o/logits/attention eager"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_evidence_that_cannot_be_fails_without_any_limit(case: str) -> None:
    kind, values, site = IMPOSSIBLE[case]
    verdict = judge(with_value(clean(), kind, 0, **values), BUILT_IN)
    assert verdict.verdict == "fail"
    expected = "nan" if "infinite" in case else "impossible"
    assert (expected, site) in [(f.symptom, f.site) for f in verdict.findings]


@pytest.mark.parametrize("values", [{"seconds": NAN}, {"seconds": -1.0}, {"batches": -(10**400)}])
def test_a_corner_that_cannot_be_fails(values: dict[str, Any]) -> None:
    corners = {**clean().corners, "R_e": replace(corner("R_e"), **values)}
    found = judge(replace(clean(), corners=corners), BUILT_IN)
    assert [(f.stage, f.site) for f in found.findings] == [("run", "R_e")]


def test_no_error_over_no_noise_is_no_error() -> None:
    none = dict.fromkeys(("max_abs", "mean_abs", "noise_max", "noise_l2"), 0.0)
    exact = with_value(clean(), "conversion", 0, **none, ratio_max=0.0, ratio_l2=0.0)
    assert judge(exact, BUILT_IN).verdict == "pass"


def test_rounding_may_leave_a_divergence_below_zero_and_a_cosine_above_one() -> None:
    rounded = with_value(clean(), "conversion", 0, kl=-1e-15, cosine=1.0000001)
    assert judge(with_value(rounded, "drift", 0, kl=-1e-15), POLICY).verdict == "pass"


ROWS = ["effects", "drift", "interaction", "conversion", "shapes", "tolerances", "repeats"]


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_corners_that_did_not_run_fail(kind: str) -> None:
    foreign = clean() if kind != "conversion" else replace(clean(), conversion=(conversion("C_e"),))
    rows: dict[str, Any] = {kind: getattr(foreign, kind)}
    if kind == "conversion":
        rows[kind] = (*conversion_only().conversion, *rows[kind])
    verdict = judge(replace(conversion_only(), **rows), BUILT_IN)
    assert {f.symptom for f in verdict.findings} == {"impossible"}
    assert "did not run" in verdict.findings[0].message


@pytest.mark.parametrize("kept", ["effects", "drift"])
def test_every_stimulus_set_needs_its_interaction(kept: str) -> None:
    without_one = replace(clean(), interaction=clean().interaction[:1])
    other = {"effects": "drift", "drift": "effects"}[kept]
    changes: dict[str, Any] = {other: ()}
    verdict = judge(replace(without_one, **changes), BUILT_IN)
    assert [(f.stage, f.symptom, f.site) for f in verdict.findings] == [
        ("coverage", "not measured", "I/preserve")
    ]


@pytest.mark.parametrize("rows", [0, -1])
def test_embedding_rows_that_nobody_compared_fail(rows: int) -> None:
    verdict = judge(replace(clean(), covered_rows=rows), BUILT_IN)
    found = [(f.stage, f.symptom) for f in verdict.findings]
    assert found == [("coverage", "embedding not compared")]
    said = Finding("coverage", "embedding not compared", "R_e", "no table was found")
    both = replace(clean(), covered_rows=rows, faults=(said,))
    assert judge(both, BUILT_IN).findings == (said,)


@pytest.mark.parametrize("name", ["T_o", "T_e", "R_o", "R_e"])
def test_a_missing_corner_fails(name: str) -> None:
    verdict = judge(without(clean(), name), BUILT_IN)
    assert verdict.verdict == "fail"
    assert ("missing corner", name) in [(f.symptom, f.site) for f in verdict.findings]


@pytest.mark.parametrize("status", ["crash", "timeout", "error", "", "OK"])
def test_a_corner_that_is_not_ok_fails(status: str) -> None:
    corners = {**clean().corners, "R_e": corner("R_e", status)}
    assert judge(replace(clean(), corners=corners), BUILT_IN).verdict == "fail"


def test_a_runtime_more_exact_than_pytorch_may_be_distributed_as_it_likes() -> None:
    exact = with_value(clean(), "shapes", 0, overlap=0.2, sigma_ratio=1.5)
    assert judge(exact, BUILT_IN).verdict == "pass"


def test_few_elements_overlap_less_by_chance() -> None:
    few = with_value(clean(), "shapes", 0, overlap=0.6, sigma_ratio=1.6, elements=100)
    assert judge(few, BUILT_IN).verdict == "pass"
    assert judge(with_value(few, "shapes", 0, elements=1000), BUILT_IN).verdict == "fail"


def test_what_a_narrower_type_does_is_no_fault() -> None:
    rows = (repeat("T_o", "computed in float16", "compute", ratio_max=1e6, nonfinite=7),)
    assert judge(replace(clean(), repeats=rows), BUILT_IN).verdict == "pass"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_asked_for_in_addition(name: str) -> None:
    policy = Policy.model_validate({"schema": 1, "conversion": {"preset": name}})
    held = dict.fromkeys(PRESETS, 3) | {name: 0}
    both = (tolerance("C_o", outside=held), tolerance("C_e", outside=held))
    within = replace(clean(), tolerances=both)
    assert judge(within, policy).verdict == "pass"
    assert judge(with_value(within, "conversion", 0, ratio_max=8.01), policy).verdict == "fail"


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1e9), st.floats(0, 1e9))
def test_less_overlap_and_more_sigma_never_help(
    overlap: float, less: float, sigma_ratio: float, more: float
) -> None:
    def verdict(overlap: float, sigma_ratio: float) -> str:
        changed = {"overlap": overlap, "sigma_ratio": sigma_ratio}
        return judge(with_value(clean(), "shapes", 0, **changed), BUILT_IN).verdict

    if verdict(overlap, sigma_ratio) == "fail":
        assert verdict(overlap * less, sigma_ratio + more) == "fail"


def test_a_limit_is_inclusive() -> None:
    edges = (conversion("C_o", 8.0), conversion("C_e", 8.0))
    assert judge(replace(clean(), conversion=edges), BUILT_IN).verdict == "pass"


@pytest.mark.parametrize(
    ("c_o", "c_e", "blamed"),
    [
        (1.3, 400.0, "the conversion of the edited model is at fault (C_o is at 1.3)"),
        (390.0, 400.0, "the converter is at fault, with or without the edit (C_o is at 390)"),
        (400.0, 1.3, "the conversion of the original model is at fault (C_e is at 1.3)"),
        (9000.0, 100.0, "C_o is worse (C_o is at 9e+03)"),
    ],
)
def test_the_message_says_who_is_at_fault(c_o: float, c_e: float, blamed: str) -> None:
    edges = (conversion("C_o", c_o), conversion("C_e", c_e))
    assert blamed in messages(replace(clean(), conversion=edges))


def test_an_edit_without_any_effect_is_judged_by_noise() -> None:
    still = replace(interaction("preserve", 0.0, 0.0), ratio=NAN, rho=NAN)
    both = (interaction("target", 84.2, 3e-6), still)
    assert judge(replace(clean(), interaction=both), BUILT_IN).verdict == "pass"


def test_a_share_of_an_effect_within_noise_excuses_nothing() -> None:
    row = interaction("preserve", 1e-3, 9.0)
    lenient = Policy.model_validate({"schema": 1, "interaction": {"max_ratio": 10.0}})
    assert "nothing beyond noise" in messages(replace(clean(), interaction=(row,)), lenient)


def test_an_interaction_within_noise_passes_whatever_its_share() -> None:
    row = interaction("target", 1e-2, 0.2)
    assert row.effect > 8 * row.noise and row.noise_ratio < 8
    both = (row, interaction("preserve", 2.1e-3, 0.2))
    assert judge(replace(clean(), interaction=both), BUILT_IN).verdict == "pass"


def test_the_lost_edit_is_seen_at_every_stage() -> None:
    stages = [finding.stage for finding in judge(edit_lost(), POLICY).findings]
    assert sorted(set(stages)) == ["conversion", "interaction", "lineage", "preserve", "target"]


# ------------------------------------------------------------------- what holds for any evidence

MEASURED = [
    *(("conversion", f.name) for f in fields(Conversion) if f.type.startswith("float")),
    *(("interaction", f.name) for f in fields(Interaction) if f.type == "float"),
    ("drift", "kl"),
    ("drift", "flip_rate"),
    *(("shapes", f.name) for f in fields(ErrorShape) if f.type == "float"),
    *(("tolerances", f.name) for f in fields(Tolerance) if f.type == "float"),
    *(("repeats", f.name) for f in fields(Repeat) if f.type == "float"),
]
ERRORS = [
    ("conversion", "ratio_max"),
    ("conversion", "ratio_l2"),
    ("drift", "kl"),
    ("drift", "flip_rate"),
    ("shapes", "sigma_ratio"),
    ("repeats", "ratio_max"),
    ("repeats", "ratio_l2"),
]


def with_value(evidence: Evidence, kind: str, index: int, **values: Any) -> Evidence:
    rows = list(getattr(evidence, kind))
    index %= len(rows)
    rows[index] = replace(rows[index], **values)
    changes: dict[str, Any] = {kind: tuple(rows)}
    return replace(evidence, **changes)


limits = st.floats(0, 1e300)
policies = st.builds(
    lambda a, b, c, d: Policy.model_validate(
        {
            "schema": 1,
            "conversion": {"max_noise_ratio": a, "max_sigma_ratio": d, "min_overlap": 0},
            "interaction": {"max_ratio": b, "max_noise_ratio": c},
            "preserve": {"max_kl": d},
        }
    ),
    *(limits,) * 4,
)


@given(st.sampled_from(MEASURED), st.integers(0, 3), policies)
def test_no_policy_lets_nan_pass(where: tuple[str, str], index: int, policy: Policy) -> None:
    kind, name = where
    assert judge(with_value(clean(), kind, index, **{name: NAN}), policy).verdict == "fail"


@given(st.sampled_from(["T_o", "T_e", "R_o", "R_e"]), policies, st.booleans())
def test_no_policy_lets_a_missing_or_broken_corner_pass(
    name: str, policy: Policy, missing: bool
) -> None:
    broken = replace(clean(), corners={**clean().corners, name: corner(name, "timeout")})
    evidence = without(clean(), name) if missing else broken
    assert judge(evidence, policy).verdict == "fail"


@given(policies, st.text(), st.text())
def test_no_policy_lets_a_fault_pass(policy: Policy, stage: str, message: str) -> None:
    fault = Finding(stage, "any", "any", message)
    assert judge(replace(clean(), faults=(fault,)), policy).verdict == "fail"


@given(
    st.sampled_from(ERRORS),
    st.integers(0, 3),
    st.floats(0, 1e6),
    st.floats(0, allow_infinity=True),
)
def test_a_larger_error_never_helps(
    where: tuple[str, str], index: int, value: float, more: float
) -> None:
    kind, name = where
    policy = Policy(schema=1, preserve=PreservePolicy(max_kl=1.0, max_flip_rate=0.5))
    small = with_value(clean(), kind, index, **{name: value})
    large = with_value(clean(), kind, index, **{name: value + more})
    if judge(small, policy).verdict == "fail":
        assert judge(large, policy).verdict == "fail"


@given(st.floats(1e-9, 1e6), st.floats(1e-9, 1e3), st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_larger_interaction_never_helps(
    size: float, noise: float, norm: float, more: float
) -> None:
    def verdict(norm: float) -> str:
        row = Interaction("target", "logits", size, norm, norm / size, 0.0, noise, norm / noise)
        both = (row, interaction("preserve", 2.1e-3, 0.2))
        return judge(replace(clean(), interaction=both), BUILT_IN).verdict

    assert verdict(0.0) == "pass"
    if verdict(norm) == "fail":
        assert verdict(norm + more) == "fail"
