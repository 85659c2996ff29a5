"""The report file: it holds the evidence, whatever the numbers and names are."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from evidences import POLICY, clean, conversion, conversion_only, edit_lost, report

from surgery.errors import ReportError
from surgery.evidence import Effect, Evidence, Finding
from surgery.gate import judge
from surgery.policy import BUILT_IN
from surgery.report import RENDERERS, load_report, render, report_schema


def saved(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "report.json"
    path.write_text(text)
    return path


@pytest.mark.parametrize("evidence", [clean(), conversion_only(), Evidence(corners={})])
def test_a_report_reads_back_as_its_evidence(tmp_path: Path, evidence: Evidence) -> None:
    made = report(evidence)
    read = load_report(saved(tmp_path, made.dump()))
    assert read == made
    assert read.evidence() == evidence
    assert judge(read.evidence(), read.policy).verdict == made.verdict


def test_the_verdict_can_be_reached_again_under_another_policy(tmp_path: Path) -> None:
    made = report(clean(), BUILT_IN)
    read = load_report(saved(tmp_path, made.dump()))
    assert judge(read.evidence(), POLICY) == judge(clean(), POLICY)


def test_numbers_that_json_has_not_are_strings(tmp_path: Path) -> None:
    values = {"T_o": math.nan, "T_e": math.inf, "R_o": -math.inf, "R_e": 1.0}
    evidence = Evidence(
        corners=clean().corners,
        effects=(Effect("m", "target", 1, values, "NaN"),),
        faults=(Finding("run", "NaN", "Infinity", "m", math.nan, math.inf),),
    )
    text = report(evidence).dump()
    assert json.loads(text)["effects"][0]["corners"] == {
        "T_o": "NaN",
        "T_e": "Infinity",
        "R_o": "-Infinity",
        "R_e": 1.0,
    }
    read = load_report(saved(tmp_path, text)).evidence()
    assert math.isnan(read.effects[0].corners["T_o"])
    assert read.effects[0].corners["R_o"] == -math.inf
    assert read.effects[0].unit == "NaN" and read.faults[0].limit == math.inf


def test_hostile_names_survive_the_file_escaped(tmp_path: Path) -> None:
    made = report(edit_lost())
    assert made.dump().isascii()
    read = load_report(saved(tmp_path, made.dump()))
    site = read.faults[0].site
    assert site == "h.2.attn.c_proj.weight|<script>alert(1)</script>\\x1b[31m\\ud800"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (('"schema": 1', '"schema": 2'), "expected 1, found 2 @ schema"),
        (('"schema": 1', '"schema": true'), "expected 1, found true @ schema"),
        (('"verdict": "pass"', '"verdict": "passed"'), "@ verdict"),
        (('"compared": 8', '"compared": "8"'), "not JSON"),
        (('"max_abs": 2.0', '"max_abs": "x2.0'), "not JSON"),
        (('"T_o": {', '"T_x": {'), "@ corners.T_x"),
        (('"drift": [', '"drifts": ['), "did you mean 'drift'?"),
        (('"seconds": 1.32', '"seconds": "nan"'), "found 'nan' @ corners.T_o.seconds"),
        (('"seconds": 1.32', '"seconds": NaN'), "NaN is not JSON"),
        (('"seconds": 1.32', '"seconds": true'), "found true @ corners.T_o.seconds"),
    ],
)
def test_a_malformed_report_is_refused(
    tmp_path: Path, change: tuple[str, str], expected: str
) -> None:
    text = report(clean()).dump()
    assert change[0] in text
    path = saved(tmp_path, text.replace(*change))
    with pytest.raises(ReportError) as caught:
        load_report(path)
    assert expected in str(caught.value) and str(caught.value).isprintable()


def forged(**changes: object) -> str:
    return json.dumps({**json.loads(report(edit_lost()).dump()), **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"verdict": "pass", "findings": []}, "its verdict is not what its evidence says"),
        ({"verdict": "not_evaluated"}, "expected fail, found not_evaluated"),
        ({"findings": []}, "its findings are not what its evidence says"),
    ],
)
def test_a_verdict_written_in_by_hand_is_refused(
    tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    with pytest.raises(ReportError) as caught:
        load_report(saved(tmp_path, forged(**changes)))
    assert expected in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["\x1b" * 9_000, "é\ud800" * 6_000, "x" * 10_001, "x" * 9_990])
def test_findings_about_any_name_are_found_again(tmp_path: Path, name: str) -> None:
    row = conversion("C_o", 1 / 3 * 1e3, output=name, worst=name)
    evidence = replace(conversion_only(), conversion=(row,))
    made = report(evidence)
    assert made.verdict == "fail"
    assert load_report(saved(tmp_path, made.dump())) == made


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b"{"])
def test_what_is_no_report_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(data)
    with pytest.raises(ReportError):
        load_report(path)


def test_the_schema_allows_spelled_numbers() -> None:
    schema = report_schema()
    spelled = {"enum": ["NaN", "Infinity", "-Infinity"], "type": "string"}
    assert spelled in schema["$defs"]["Conversion"]["properties"]["ratio_max"]["anyOf"]
    expected = "schema verdict corners conversion interaction effects findings environment inputs"
    assert set(expected.split()) <= set(schema["required"])


@pytest.mark.parametrize("format", RENDERERS)
@pytest.mark.parametrize("evidence", [clean(), conversion_only(), edit_lost(), Evidence({})])
def test_every_format_renders_every_verdict(format: str, evidence: Evidence) -> None:
    made = report(evidence)
    text = render(made, format)
    assert text.endswith("\n") or format == "html"
    assert not set(text) & {"\x1b", "\ud800", "\x00"}
    assert made.verdict.split("_")[0] in text.lower()


def test_judging_a_report_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'onnxruntime', 'numpy', 'jinja2', 'rich', 'scipy', 'transformers'}"
    code = f"import sys, surgery.report, surgery.gate; print({heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "set()\n"


def test_issues_that_the_findings_do_not_say_are_refused(tmp_path: Path) -> None:
    data = json.loads(report(edit_lost()).dump())
    assert data["issues"][0]["fingerprint"]
    data["issues"] = data["issues"][1:]
    with pytest.raises(ReportError, match="its issues are not what its findings say"):
        load_report(saved(tmp_path, json.dumps(data)))
