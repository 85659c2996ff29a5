"""Clean cases, made when a test first asks for them, and the differential test of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corners import Case, Exporter, Here

from surgery import pipeline
from surgery.evidence import Finding
from surgery.report import Report

PROMPTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "target": ((7, 8, 9), (10, 11, 12, 13, 14), (15, 16)),
    "preserve": ((20, 21, 22, 23), (24, 25, 26, 27, 28, 29, 30)),
}


def write_stimuli(path: Path, prompts: dict[str, tuple[tuple[int, ...], ...]] = PROMPTS) -> Path:
    lines = [
        {"id": f"{name} {number}", "set": name, "input_ids": list(ids)}
        for name, rows in prompts.items()
        for number, ids in enumerate(rows)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@dataclass
class Lab:
    """Cases, and `pipeline.diff` on them in this process."""

    root: Path
    here: Here
    exporter: Exporter = field(default_factory=Exporter)
    _cases: dict[str, Case] = field(default_factory=dict)

    def case(self, family: str, dtype: str = "float32", task: str | None = None) -> Case:
        name = f"{family}-{dtype}-{task}"
        if name not in self._cases:
            root = self.root / name
            self._cases[name] = self.exporter.case(root, family, task=task, dtype=dtype)
        return self._cases[name]

    @property
    def stimuli(self) -> Path:
        path = self.root / "stimuli.jsonl"
        return path if path.exists() else write_stimuli(path)

    def diff(self, case: Case, **given: Any) -> Report:
        """`pipeline.diff` of the original pair; `given` replaces or adds arguments."""
        arguments = {"onnx": case.onnx, "stimuli": [self.stimuli], **given}
        with self.here.installed():
            return pipeline.diff(case.model, **arguments)

    def diff_edited(self, case: Case, **given: Any) -> Report:
        """`pipeline.diff` of all four corners."""
        own = {"edited": case.edited, "edited_onnx": case.edited_onnx}
        return self.diff(case, **{**own, **given})


LOCALISED = ("localize", "capture", "translate", "optimise", "kernel")
"""The stages of what a localisation adds to a conversion that failed; it has its own tests."""


def measured(report: Report) -> list[Finding]:
    """Every finding but those of the localisation."""
    return [finding for finding in report.findings if finding.stage not in LOCALISED]


def found(report: Report) -> set[tuple[str, str]]:
    """Stage and symptom of every measured finding."""
    return {(finding.stage, finding.symptom) for finding in measured(report)}


def finding(report: Report, stage: str, symptom: str) -> Finding:
    """The first finding of that stage and symptom; the report must have failed."""
    assert report.verdict == "fail"
    named = [f for f in report.findings if (f.stage, f.symptom) == (stage, symptom)]
    assert named, found(report)
    return named[0]
