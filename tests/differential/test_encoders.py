"""Encoders with what follows them: pooled outputs and classes are compared, and damage is seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from corners import Here
from models import MODELS, make
from safetensors.numpy import load_file, save_file

from surgery import api
from surgery.report import Report

POOLED = "bert-pooled"
CLASSIFIERS = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    for family, cls in {**CLASSIFIERS, POOLED: "BertModel"}.items():
        fields = MODELS[family.partition("-")[0]][1]
        monkeypatch.setitem(MODELS, f"{family}-x", (cls, {**fields, "num_labels": 3}))
    with Here(tmp_path / "corners").installed():
        yield


def report_of(model: Path, onnx: Path, task: str) -> Report:
    return api.diff(model, onnx=onnx, task=task)


def damaged(model: Path, tensor: str, folder: Path) -> Path:
    """The same model with another number in one tensor."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor] = tensors[tensor] * 1.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "task", "output", "tensor"),
    [
        (POOLED, "encoder", "pooler_output", "pooler.dense.weight"),
        ("bert", "sequence-classification", "logits", "classifier.weight"),
        ("roberta", "sequence-classification", "logits", "classifier.out_proj.weight"),
        ("distilbert", "sequence-classification", "logits", "pre_classifier.weight"),
    ],
)
def test_what_follows_an_encoder_is_compared(
    family: str, task: str, output: str, tensor: str, tmp_path: Path
) -> None:
    model = make(f"{family}-x", tmp_path / "model")
    onnx = api.export(model, tmp_path / "onnx", task=task).model
    report = report_of(model, onnx, task)
    assert (report.verdict, list(report.findings)) == ("pass", [])
    assert output in {row.output for row in report.conversion}

    other = api.export(damaged(model, tensor, tmp_path / "other"), tmp_path / "bad", task=task)
    report = report_of(model, other.model, task)
    worst = {row.output: row.ratio_l2 for row in report.conversion}
    assert report.verdict == "fail"
    assert worst[output] > 100
    assert any(output in finding.site for finding in report.findings)


def test_a_text_has_one_row_of_classes(tmp_path: Path) -> None:
    model = make("bert-x", tmp_path / "model")
    onnx = api.export(model, tmp_path / "onnx", task="sequence-classification").model
    [row] = report_of(model, onnx, "sequence-classification").conversion
    assert row.positions < 30
