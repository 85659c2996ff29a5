"""The law about behaviour statistics: impossible rows, new limits, confidence and calibration."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from behaviours import behaved, divergence, interval, parting
from evidences import POLICY, clean, conversion_only, report
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import PolicyError
from surgery.evidence import Divergence, Evidence, Interval
from surgery.gate import judge
from surgery.policy import BUILT_IN, Policy, load_policy
from surgery.report import load_report, report_schema

NAN, INF = math.nan, math.inf
LIMITS = {"max_kl": 0.01, "max_flip_rate": 0.05, "max_real_flip_rate": 0.03, "max_log_ratio": 0.01}


def policy(
    confidence: float | None = 0.95, target: list[dict[str, Any]] | None = None, **limits: float
) -> Policy:
    return Policy.model_validate(
        {
            "schema": 1,
            "preserve": {**(limits or LIMITS), "confidence": confidence},
            "target": target or [],
        },
        strict=False,
    )


RULE = {"metric": "memory_rate", "min_change": 0.4, "confidence": 0.95}
TARGET = Policy.model_validate({"schema": 1, "target": (RULE,)})


def found(evidence: Evidence, policy: Policy) -> list[tuple[str, str, str]]:
    return [(f.stage, f.symptom, f.site) for f in judge(evidence, policy).findings]


def changed(evidence: Evidence, kind: str, chosen: Any, **values: Any) -> Evidence:
    """`evidence` with values replaced in the rows of `kind` that `chosen` holds for."""
    rows = tuple(replace(r, **values) if chosen(r) else r for r in getattr(evidence, kind))
    changes: dict[str, Any] = {kind: rows}
    return replace(evidence, **changes)


def at(pair: str, stimulus_set: str = "preserve") -> Any:
    return lambda row: (row.pair, row.stimulus_set) == (pair, stimulus_set)


@pytest.mark.parametrize("asked", [BUILT_IN, POLICY, policy(), policy(None), policy(0.99), TARGET])
def test_sound_statistics_within_every_limit_pass(asked: Policy) -> None:
    assert judge(behaved(), asked).findings == ()


def test_reports_without_statistics_are_judged_as_before() -> None:
    assert judge(clean(), POLICY).verdict == "pass"
    old = json.loads(report(clean()).dump())
    for name in ("divergence", "partings", "intervals"):
        del old[name]
    for name in ("max_real_flip_rate", "max_log_ratio", "confidence"):
        del old["policy"]["preserve"][name]
    for rule in old["policy"]["target"]:
        del rule["confidence"]
    assert judge(type(report(clean())).model_validate_json(json.dumps(old)).evidence(), POLICY) == (
        judge(clean(), POLICY)
    )


@pytest.mark.parametrize("name", LIMITS)
def test_statistics_that_are_asked_for_and_absent_fail(name: str) -> None:
    """Never a pass by absence: neither of a new limit, nor of an old one with confidence."""
    asked = policy(0.95, **{name: LIMITS[name]})
    verdict = judge(clean(), asked)
    assert {f.symptom for f in verdict.findings} == {"not measured"}
    sites = {f.site for f in verdict.findings}
    assert sites == {f"preserve/{pair}/{name[4:]}" for pair in ("T", "R", "C_o", "C_e")}


def test_a_rule_with_confidence_fails_without_intervals() -> None:
    assert found(clean(), TARGET) == [
        ("target", "not measured", "target/memory_rate/T"),
        ("target", "not measured", "target/memory_rate/R"),
    ]
    assert judge(conversion_only(), TARGET).verdict == "fail"


def test_a_confidence_higher_than_measured_is_not_measured_and_a_lower_one_is() -> None:
    only = changed(behaved(), "intervals", lambda row: True)
    only = replace(only, intervals=tuple(r for r in only.intervals if r.confidence == 0.95))
    assert judge(only, policy(0.9)).verdict == "pass"
    assert {symptom for _, symptom, _ in found(only, policy(0.96))} == {"not measured"}


@pytest.mark.parametrize("runtime", ["T", "R"])
@pytest.mark.parametrize(
    ("values", "site"),
    [
        ({"flips": 5, "near_ties": 1}, "real_flip_rate"),
        ({"perplexity": {"log_before": 1.0, "log_after": 1.02, "log_ratio": 0.02}}, "log_ratio"),
        ({"perplexity": {"log_before": 1.0, "log_after": 0.98, "log_ratio": -0.02}}, "log_ratio"),
    ],
)
def test_new_limits_hold_in_each_runtime_and_on_both_sides(
    runtime: str, values: dict[str, Any], site: str
) -> None:
    moved = changed(behaved(), "divergence", at(runtime), **values)
    assert found(moved, policy(None)) == [("preserve", "drift", f"preserve/{runtime}/{site}")]
    assert judge(moved, BUILT_IN).verdict == "pass"
    elsewhere = changed(behaved(), "divergence", at(runtime, "target"), **values)
    assert judge(elsewhere, policy(None)).verdict == "pass", "the target set is judged apart"


@pytest.mark.parametrize("runtime", ["T", "R"])
@pytest.mark.parametrize("name", LIMITS)
def test_with_confidence_the_whole_interval_keeps_to_the_limit(runtime: str, name: str) -> None:
    quantity, limit = name[4:], LIMITS[name]
    wide = changed(
        behaved(),
        "intervals",
        lambda row: (row.quantity, row.pair) == (quantity, runtime),
        high=limit * 1.01,
    )
    place = ("preserve", "not certain", f"preserve/{runtime}/{quantity}")
    assert found(wide, policy(0.95)) == [place]
    assert judge(wide, policy(None)).verdict == "pass"


def test_a_perplexity_may_neither_rise_nor_fall() -> None:
    low = changed(behaved(), "intervals", lambda row: row.quantity == "log_ratio", low=-0.02)
    assert {site for _, _, site in found(low, policy(0.95))} == {
        "preserve/T/log_ratio",
        "preserve/R/log_ratio",
    }


@pytest.mark.parametrize("edge", ["C_o", "C_e"])
def test_a_limit_that_the_conversion_alone_exceeds_judges_nothing(edge: str) -> None:
    noisy = changed(behaved(), "divergence", at(edge), flips=6)
    place = ("preserve", "A/A beyond limit", f"preserve/{edge}/flip_rate")
    assert found(noisy, policy(0.95, max_flip_rate=0.05)) == [place]
    assert judge(noisy, policy(None, max_flip_rate=0.05)).verdict == "pass"


@pytest.mark.parametrize(
    ("rule", "passes"),
    [
        ({"min_change": 0.48}, True),
        ({"min_change": 0.481}, False),
        ({"max_change": 0.68}, True),
        ({"max_change": 0.679}, False),
        ({"min_change": 0.48, "max_change": 0.68}, True),
        ({"min_change": 0.5, "max_change": 0.6}, False),
    ],
)
def test_a_rule_holds_for_the_whole_interval_on_both_sides(
    rule: dict[str, float], passes: bool
) -> None:
    asked = policy(None, [{"metric": "memory_rate", "confidence": 0.95, **rule}])
    exact = changed(
        behaved(), "intervals", lambda row: row.quantity == "memory_rate", low=0.48, high=0.68
    )
    assert (judge(exact, asked).verdict == "pass") == passes
    without = policy(None, [{"metric": "memory_rate", **rule}])
    assert judge(exact, without).verdict == "pass"


def test_an_interval_is_widened_by_what_the_runtimes_differ() -> None:
    corners = {"T_o": 0.40, "T_e": 0.98, "R_o": 0.40, "R_e": 0.89}
    apart = changed(behaved(), "effects", lambda row: row.metric == "memory_rate", corners=corners)
    apart = changed(apart, "intervals", lambda row: row.quantity == "memory_rate", estimate=0.5)
    assert [symptom for _, symptom, _ in found(apart, TARGET)] == ["not certain"] * 2


@pytest.mark.parametrize("missing", ["R_o", "R_e"])
def test_a_metric_that_one_runtime_lacks_is_not_calibrated(missing: str) -> None:
    corners = {"T_o": 0.40, "T_e": 0.98, "R_o": 0.40, "R_e": 0.98}
    del corners[missing]
    lacking = changed(behaved(), "effects", lambda r: r.metric == "memory_rate", corners=corners)
    assert ("target", "not certain", "target/memory_rate/T") in found(lacking, TARGET)


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "no positions": ("divergence", {"positions": 0}),
    "more flips than positions": ("divergence", {"flips": 101}),
    "more near-ties than flips": ("divergence", {"near_ties": 3}),
    "negative near-ties": ("divergence", {"near_ties": -1}),
    "more tokens than positions": ("divergence", {"tokens": 101}),
    "no divergence": ("divergence", {"kl": {}}),
    "tokens without a table": ("divergence", {"delta_p": {}}),
    "unknown pair": ("divergence", {"pair": "C_x"}),
    "more apart than responses": ("partings", {"parted": 11}),
    "near-ties of none": ("partings", {"near_ties": 4}),
    "no responses": ("partings", {"responses": 0}),
    "a place where nothing parts": ("partings", {"parted": 0, "near_ties": 0}),
    "no place where some part": ("partings", {"first": None}),
    "a median before the first": ("partings", {"first": 3}),
    "an interval turned round": ("intervals", {"low": 1.0}),
    "an estimate outside": ("intervals", {"high": -1.0}),
    "certainty": ("intervals", {"confidence": 1.0}),
    "an interval of nothing": ("intervals", {"count": 0}),
    "a negative divergence": ("intervals", {"low": -1.0}),
}


@pytest.mark.parametrize("case", WRONG)
def test_statistics_that_cannot_be_fail_without_any_limit(case: str) -> None:
    kind, values = WRONG[case]
    verdict = judge(changed(behaved(), kind, at("T"), **values), BUILT_IN)
    assert "impossible" in {f.symptom for f in verdict.findings}


TABLES: dict[str, tuple[str, dict[str, float]]] = {
    "a negative KL": ("kl", {"min": -1e-3}),
    "a negative error": ("kl", {"error": -1.0}),
    "a mean beyond the largest": ("kl", {"mean": 9.0}),
    "percentiles out of order": ("kl", {"median": 0.5}),
    "a name of ours it is not": ("kl", {"mode": 0.0}),
    "a probability beyond 1": ("delta_p", {"max": 1.5}),
    "a correlation beyond 1": ("perplexity", {"correlation": 1.1}),
    "a negative perplexity": ("perplexity", {"before": -1.0}),
    "a negative error of it": ("perplexity", {"ratio_error": -1.0}),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_that_cannot_be_fail_without_any_limit(case: str) -> None:
    name, values = TABLES[case]
    row = divergence("preserve", "T")
    wrong = replace(row, **{name: {**getattr(row, name), **values}})
    verdict = judge(replace(behaved(), divergence=(wrong,)), BUILT_IN)
    places = [(f.stage, f.symptom, f.site) for f in verdict.findings]
    assert places == [("preserve", "impossible", "preserve/T/divergence")]


def names_of(row: Divergence) -> list[tuple[str, str]]:
    tables = ("kl", "perplexity", "delta_p")
    return [(table, name) for table in tables for name in getattr(row, table)]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(("table", "name"), names_of(divergence("target", "C_o")))
def test_no_number_of_a_table_may_be_none(table: str, name: str, bad: float) -> None:
    row = divergence("target", "C_o")
    wrong = replace(row, **{table: {**getattr(row, table), name: bad}})
    verdict = judge(replace(behaved(), divergence=(wrong,)), BUILT_IN)
    assert ("conversion", "nan", "C_o/target/divergence") in [
        (f.stage, f.symptom, f.site) for f in verdict.findings
    ]


@pytest.mark.parametrize("row", [divergence("target", "R"), parting("target", "C_e")])
def test_statistics_of_corners_that_did_not_run_fail(row: Any) -> None:
    kind = "divergence" if isinstance(row, Divergence) else "partings"
    changes: dict[str, Any] = {kind: (row,)}
    verdict = judge(replace(conversion_only(), **changes), BUILT_IN)
    assert [f.symptom for f in verdict.findings] == ["impossible"]


# ------------------------------------------------------------------- what holds for any evidence

sizes = st.floats(0, 1)
asked = st.builds(
    lambda a, b, c, d, confidence: policy(
        confidence, max_kl=a, max_flip_rate=b, max_real_flip_rate=c, max_log_ratio=d
    ),
    *(sizes,) * 4,
    st.sampled_from([None, 0.5, 0.95, 0.99]),
)
preserved = st.sampled_from(["kl", "flip_rate", "real_flip_rate", "log_ratio"])


def fails(evidence: Evidence, policy: Policy) -> bool:
    return judge(evidence, policy).verdict == "fail"


@given(asked, preserved, st.sampled_from(["T", "R"]), sizes, sizes)
def test_a_wider_interval_never_helps(
    policy: Policy, quantity: str, pair: str, low: float, high: float
) -> None:
    def widened(row: Interval, by: tuple[float, float]) -> Interval:
        named = (row.quantity, row.pair) == (quantity, pair)
        floor = 0.0 if quantity != "log_ratio" else -INF
        low, high = max(row.low - by[0], floor), min(row.high + by[1], 1.0)
        return replace(row, low=low, high=high) if named else row

    def with_intervals(by: tuple[float, float]) -> Evidence:
        own = behaved()
        return replace(own, intervals=tuple(widened(row, by) for row in own.intervals))

    if fails(with_intervals((0.0, 0.0)), policy):
        assert fails(with_intervals((low, high)), policy)


@given(asked, st.sampled_from(["T", "R", "C_o", "C_e"]), st.integers(0, 100), st.integers(0, 100))
def test_more_flips_never_help(policy: Policy, pair: str, one: int, other: int) -> None:
    few, many = sorted((one, other))
    row = changed(behaved(), "divergence", at(pair), flips=few, near_ties=0)
    if fails(row, policy):
        assert fails(changed(row, "divergence", at(pair), flips=many), policy)


@given(asked, st.sampled_from(["T", "R", "C_o", "C_e"]), st.floats(-1, 1), st.floats(1, 10))
def test_a_larger_change_of_perplexity_never_helps(
    policy: Policy, pair: str, change: float, times: float
) -> None:
    def with_ratio(ratio: float) -> Evidence:
        table = {"log_before": 20.0, "log_after": 20.0 + ratio, "log_ratio": ratio}
        return changed(behaved(), "divergence", at(pair), perplexity=table)

    if fails(with_ratio(change), policy):
        assert fails(with_ratio(change * times), policy)


@given(asked, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_asking_for_confidence_never_helps(policy: Policy, confidence: float) -> None:
    plain = policy.model_copy(
        update={"preserve": policy.preserve.model_copy(update={"confidence": None})}
    )
    sure = policy.model_copy(
        update={"preserve": policy.preserve.model_copy(update={"confidence": confidence})}
    )
    if fails(behaved(), plain):
        assert fails(behaved(), sure)


@given(st.floats(-1, 1), st.floats(-1, 1), sizes, sizes, st.floats(0, 0.5))
def test_a_wider_change_or_a_larger_difference_between_runtimes_never_helps(
    one: float, other: float, low: float, high: float, apart: float
) -> None:
    least, most = sorted((one, other))
    rule = {"metric": "memory_rate", "min_change": least, "max_change": most, "confidence": 0.95}
    asked = policy(None, [rule])

    def with_change(low: float, high: float, apart: float) -> Evidence:
        rows = tuple(
            interval("memory_rate", "target", pair, 0.58 - low, 0.58, 0.58 + high)
            for pair in ("T", "R")
        )
        corners = {"T_o": 0.40, "T_e": 0.98, "R_o": 0.40 + apart, "R_e": 0.98 + apart}
        own = replace(behaved(), intervals=rows)
        return changed(own, "effects", lambda row: row.metric == "memory_rate", corners=corners)

    if fails(with_change(0.0, 0.0, 0.0), asked):
        assert fails(with_change(low, high, apart), asked)
    if fails(with_change(low, high, 0.0), asked):
        assert fails(with_change(low, high, apart), asked)


@given(asked, st.sampled_from(["low", "estimate", "high"]), st.integers(0, 100))
def test_no_policy_lets_an_interval_of_nan_pass(policy: Policy, name: str, index: int) -> None:
    rows = list(behaved().intervals)
    index %= len(rows)
    rows[index] = replace(rows[index], **{name: NAN})
    assert fails(replace(behaved(), intervals=tuple(rows)), policy)


# ------------------------------------------------------------------------------ policy and report


def test_a_report_with_statistics_reads_back_and_is_what_its_schema_says(tmp_path: Path) -> None:
    made = report(behaved())
    path = tmp_path / "report.json"
    path.write_text(made.dump())
    assert load_report(path).evidence() == behaved()
    schema = report_schema()
    assert {"divergence", "partings", "intervals"} <= schema["properties"].keys()
    assert not {"divergence", "partings", "intervals"} & set(schema["required"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("preserve: {confidence: 0.95}", "there is none"),
        ("preserve: {max_kl: 1, confidence: 1.0}", "preserve.confidence"),
        ("preserve: {max_kl: 1, confidence: 0.4}", "preserve.confidence"),
        ("preserve: {max_real_flip_rate: 2}", "preserve.max_real_flip_rate"),
        ("preserve: {max_log_ratio: -1}", "preserve.max_log_ratio"),
        ("target: [{metric: m, min_change: 0, confidence: 95}]", "target[0].confidence"),
    ],
)
def test_a_policy_that_asks_for_nonsense_is_refused(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(f"schema: 1\n{text}\n")
    with pytest.raises(PolicyError, match=expected.replace("[", r"\[")):
        load_policy(path)


def test_the_confidences_a_policy_asks_for() -> None:
    rules = [RULE, {"metric": "m", "max_change": 0.0, "confidence": 0.8}]
    assert policy(0.99, rules).confidences == {0.99, 0.95, 0.8}
    assert BUILT_IN.confidences == set()
