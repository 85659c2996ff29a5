"""The stages composed: what is written where, what never is, and what a report says it read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corners import Exporter, Here
from models import make
from onnx_files import lookup, save
from recipes import HEADS, NEURONS, snapshot, write_recipe

from surgery import process
from surgery.checkpoint.files import sha256_file
from surgery.errors import InputError, OnnxError, PolicyError, StimuliError
from surgery.gate import judge
from surgery.pipeline import diff, validate
from surgery.policy import ConversionPolicy, Policy, TargetRule
from surgery.report import Report, load_report
from surgery.verify import verify

Base = Callable[..., Path]
Alone = tuple[list[Any], Path, bool]

STIMULI = (
    {"id": "t0", "set": "target", "input_ids": [5, 6, 7]},
    {"id": "t1", "set": "target", "input_ids": [8, 9, 10, 11, 12]},
    {"id": "p0", "set": "preserve", "input_ids": [20, 21, 22]},
)


def write_stimuli(path: Path, *more: dict[str, object]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in (*STIMULI, *more)))
    return path


@dataclass
class Run:
    """One run of `validate`, through children, and what its model's folder was before."""

    model: Path
    before: dict[str, tuple[bytes, int]]
    stimuli: Path
    output: Path
    report: Report


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("validate")
    model, stimuli = make("qwen3", root / "model"), write_stimuli(root / "stimuli.jsonl")
    before, output = snapshot(model), root / "out"
    recipe = write_recipe(root, [HEADS, NEURONS])
    return Run(model, before, stimuli, output, validate(recipe, model, output, stimuli=[stimuli]))


# ------------------------------------------------------------------------------------- validate


def test_validate_of_a_clean_edit_passes(validated: Run) -> None:
    assert (validated.report.verdict, list(validated.report.findings)) == ("pass", [])
    assert set(validated.report.corners) == {"T_o", "T_e", "R_o", "R_e"}


def test_validate_writes_the_edited_model_both_conversions_and_the_report(validated: Run) -> None:
    names = {p.relative_to(validated.output).as_posix() for p in validated.output.rglob("*")}
    assert {path for path in names if "/" not in path} == {
        "edited",
        "onnx",
        "report.json",
        "report.html",
    }
    assert {"onnx/original/model.onnx", "onnx/edited/model.onnx"} <= names
    assert verify(validated.output / "edited", validated.model).ok
    assert "<html" in (validated.output / "report.html").read_text("utf-8")


def test_validate_leaves_the_model_and_the_folder_around_it_alone(validated: Run) -> None:
    assert snapshot(validated.model) == validated.before
    around = {path.name for path in validated.output.parent.iterdir()}
    assert around == {"model", "stimuli.jsonl", "recipe.json", "out"}


def test_the_written_report_is_the_one_returned_and_judges_alike(validated: Run) -> None:
    written = load_report(validated.output / "report.json")
    assert written == validated.report
    assert judge(written.evidence(), written.policy).verdict == "pass"


def test_the_report_names_every_input_by_digest(validated: Run) -> None:
    inputs = validated.report.inputs
    folders = {
        "T_o": validated.model,
        "T_e": validated.output / "edited",
        "R_o": validated.output / "onnx/original",
        "R_e": validated.output / "onnx/edited",
    }
    for corner, folder in folders.items():
        digests = inputs[corner]["sha256"]
        assert digests == {name: sha256_file(folder / name) for name in digests}, corner
    assert {"config.json", "model.safetensors"} == set(inputs["T_e"]["sha256"])
    assert {"model.onnx", "model.onnx.data"} == set(inputs["R_e"]["sha256"])
    assert inputs["R_o"]["sha256"] != inputs["R_e"]["sha256"], "the edit is in the digests"
    assert inputs["stimuli 0"]["sha256"] == sha256_file(validated.stimuli)
    assert len(inputs["workload"]["sha256"]) == 64


def test_paths_inside_the_output_are_given_relative_to_it(validated: Run) -> None:
    """It was written under another name and renamed."""
    paths = {corner: validated.report.inputs[corner]["path"] for corner in ("T_e", "R_o", "R_e")}
    assert paths == {
        "T_e": "edited",
        "R_o": "onnx/original/model.onnx",
        "R_e": "onnx/edited/model.onnx",
    }
    assert ".staging" not in (validated.output / "report.json").read_text("utf-8")


def test_a_run_that_fails_is_written_too(base_of: Base, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, [HEADS])
    impossible = Policy(schema=1, conversion=ConversionPolicy(max_noise_ratio=0))
    with Here(tmp_path / "cache").installed():
        report = validate(recipe, base_of("bert"), tmp_path / "out", policy=impossible)
    assert report.verdict == "fail"
    assert load_report(tmp_path / "out/report.json").verdict == "fail"


# ------------------------------------------------------------------------------------ bad input


class Started(Exception):
    """A child was about to be started."""


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object) -> None:
        raise Started

    monkeypatch.setattr(process, "run", run)


UNKNOWN = Policy(schema=1, target=(TargetRule(metric="nlll", max_change=0),))

BAD: dict[str, tuple[type[InputError], dict[str, object], list[dict[str, object]]]] = {
    "unknown metric": (PolicyError, {"policy": UNKNOWN}, []),
    "unknown task": (InputError, {"task": "causal-lmm"}, []),
    "task of an encoder": (InputError, {"task": "encoder"}, []),
    "token out of range": (
        StimuliError,
        {},
        [{"id": "x", "set": "target", "input_ids": [101]}],
    ),
    "prompt too long": (
        StimuliError,
        {},
        [{"id": "x", "set": "target", "input_ids": [1] * 65}],
    ),
    "prompt without a tokenizer": (
        StimuliError,
        {},
        [{"id": "x", "set": "target", "prompt": "hello"}],
    ),
    "id twice": (StimuliError, {}, [dict(STIMULI[0])]),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("no_children")
def test_bad_stimuli_and_policies_are_refused_before_anything_runs(
    base_of: Base, tmp_path: Path, name: str
) -> None:
    error, options, lines = BAD[name]
    model = base_of("llama")
    stimuli = [write_stimuli(tmp_path / "stimuli.jsonl", *lines)]
    recipe = write_recipe(tmp_path, [HEADS])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error):
        validate(recipe, model, tmp_path / "out", stimuli=stimuli, **options)  # type: ignore[arg-type]
    with pytest.raises(error):
        diff(model, stimuli=stimuli, **options)  # type: ignore[arg-type]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("no_children")
def test_a_bad_recipe_leaves_nothing(base_of: Base, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, [{**HEADS, "heads": ["L9H0"]}])
    with pytest.raises(InputError, match="L9H0"):
        validate(recipe, base_of("llama"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


@pytest.mark.usefixtures("no_children")
def test_an_output_inside_the_model_is_refused(base_of: Base, tmp_path: Path) -> None:
    model = base_of("llama")
    before = snapshot(model)
    with pytest.raises(InputError):
        validate(write_recipe(tmp_path, [HEADS]), model, model / "out")
    assert snapshot(model) == before


def test_an_export_that_fails_leaves_nothing(
    base_of: Base, tmp_path: Path, no_children: None
) -> None:
    with pytest.raises(Started):
        validate(write_recipe(tmp_path, [HEADS]), base_of("llama"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


@pytest.mark.usefixtures("no_children")
def test_an_edited_conversion_needs_the_edited_checkpoint(base_of: Base, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give --edited too"):
        diff(base_of("llama"), edited_onnx=tmp_path / "m.onnx")


@pytest.mark.usefixtures("no_children")
@pytest.mark.parametrize("other", [("gpt2", {}), ("llama", {"vocab_size": 99})])
def test_models_of_another_shape_are_refused(
    base_of: Base, other: tuple[str, dict[str, object]]
) -> None:
    family, sizes = other
    with pytest.raises(InputError, match="vocab"):
        diff(base_of("llama"), edited=base_of(family, **sizes))


def test_an_onnx_file_that_is_none_is_bad_input(base_of: Base, tmp_path: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"\x08\x01garbage")
    for name in ("garbage.onnx", "missing.onnx"):
        with pytest.raises(OnnxError, match=name):
            diff(base_of("llama"), onnx=tmp_path / name)


def test_an_onnx_file_of_another_model_fails_and_names_the_difference(
    base_of: Base, tmp_path: Path
) -> None:
    onnx = save(lookup(), tmp_path / "other.onnx")
    with Here(tmp_path / "cache").installed():
        report = diff(base_of("llama"), onnx=onnx)
    assert report.verdict == "fail"
    assert {finding.site.split("/")[0] for finding in report.findings} <= {"R_o", "C_o"}


@dataclass
class Others:
    """A llama, and ONNX files that are not it."""

    model: Path
    files: dict[str, Path]


@pytest.fixture(scope="module")
def others(base_of: Base, tmp_path_factory: pytest.TempPathFactory) -> Others:
    root, exporter = tmp_path_factory.mktemp("others"), Exporter()
    models = {"another family": base_of("gpt2"), "an encoder": base_of("bert")}
    files = {name: exporter.export(m, root / m.parent.name) for name, m in models.items()}
    for name, rows in (("fewer tokens", 5), ("more tokens", 300)):
        table = np.ones((rows, rows), np.float32)
        files[name] = save(lookup(table=table), root / f"{rows}.onnx")
    return Others(base_of("llama"), files)


OTHERS: dict[str, tuple[str, str]] = {
    "another family": ("conversion", "wrong value"),
    "an encoder": ("interface", "shape"),
    "fewer tokens": ("run", "error"),
    "more tokens": ("interface", "shape"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_conversion_of_another_model_is_a_finding_and_no_crash(
    others: Others, tmp_path: Path, name: str
) -> None:
    stimuli = [write_stimuli(tmp_path / "stimuli.jsonl")]
    with Here(tmp_path / "cache").installed():
        report = diff(others.model, onnx=others.files[name], stimuli=stimuli)
        twice = diff(
            others.model,
            onnx=others.files[name],
            edited=others.model,
            edited_onnx=others.files[name],
            stimuli=stimuli,
        )
    for found in (report, twice):
        named = {(finding.stage, finding.symptom) for finding in found.findings}
        assert (found.verdict, OTHERS[name] in named) == ("fail", True), named


# ----------------------------------------------------------------------------------------- diff


PARENT = """
import json, sys
from pathlib import Path
from surgery.pipeline import diff

model, stimuli = map(Path, sys.argv[1:])
report = diff(model, stimuli=[stimuli])
heavy = [name for name in ("torch", "onnxruntime", "transformers") if name in sys.modules]
print(json.dumps([report.verdict, sorted(report.corners), report.inputs["R_o"], heavy]))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """`diff` without an ONNX file in a process of its own: its answer, its temporary folder, and
    whether the model was left alone."""
    root = tmp_path_factory.mktemp("alone")
    model, stimuli = make("bert", root / "model"), write_stimuli(root / "stimuli.jsonl")
    before, scratch = snapshot(model), root / "tmp"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PARENT, str(model), str(stimuli)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    return json.loads(done.stdout), scratch, snapshot(model) == before


def test_a_missing_conversion_is_exported_and_compared(alone: Alone) -> None:
    verdict, corners, onnx, _ = alone[0]
    assert (verdict, corners) == ("pass", ["R_o", "T_o"])
    # The graph alone is new: its weights are the model's own.
    assert set(onnx["sha256"]) == {"model.onnx", "model.safetensors"}


def test_nothing_is_left_of_a_temporary_export(alone: Alone) -> None:
    _, scratch, same = alone
    assert [path.name for path in scratch.iterdir() if "locks" not in path.name] == []
    assert same, "the model's folder changed"


def test_the_parent_imports_neither_torch_nor_onnxruntime(alone: Alone) -> None:
    """Their memory and their crashes belong to the children."""
    assert alone[0][3] == []


def test_a_failed_export_leaves_no_temporary_folder(
    base_of: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_children: None
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(Started):
        diff(base_of("llama"))
    assert [path.name for path in tmp_path.iterdir() if "locks" not in path.name] == []
