"""What kind of fault a finding is, and which findings are one and the same fault.

The classes are those of a study of 200 failures of ONNX converters (Jajal et al., ISSTA 2024,
arXiv 2303.17708): where in the converter, with what symptom, from what cause. Stages that no
converter has are our own: `runtime`, and `edit` for what the edit did and not the conversion.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from surgery.evidence import CORNERS, EDGES, Finding


class Stage(StrEnum):
    """Where of the way from model to runtime."""

    LOAD = "model load"
    NODES = "node conversion"
    OPTIMISATION = "graph optimisation"
    EXPORT = "export"
    VALIDATION = "validation"
    RUNTIME = "runtime"
    EDIT = "edit"
    UNKNOWN = "unclear"


class Symptom(StrEnum):
    """What is seen of it."""

    CRASH = "crash"
    WRONG_MODEL = "wrong model"
    BUILD_FAILURE = "build failure"
    BAD_PERFORMANCE = "bad performance"
    NOT_CHECKED = "not checked"
    UNREPORTED = "unreported"


class Cause(StrEnum):
    """What is behind it, as far as a finding tells."""

    INCOMPATIBILITY = "incompatibility"
    TYPE = "type problem"
    ALGORITHM = "algorithmic error"
    SHAPE = "shape problem"
    API_MISUSE = "API misuse"
    MISCONFIGURATION = "misconfiguration"
    OTHER = "other"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Issue:
    """All findings of one fault: `count` of them, at `sites`, as the study would class it."""

    fingerprint: str
    stage: str
    symptom: str
    cause: str
    count: int
    sites: tuple[str, ...]
    operator: str = ""


STAGES = {
    "load": Stage.LOAD,
    "capture": Stage.LOAD,
    "run": Stage.RUNTIME,
    "kernel": Stage.RUNTIME,
    "interface": Stage.EXPORT,
    "lineage": Stage.EXPORT,
    "embedding": Stage.NODES,
    "translate": Stage.NODES,
    "optimise": Stage.OPTIMISATION,
    "conversion": Stage.VALIDATION,
    "localize": Stage.VALIDATION,
    "coverage": Stage.VALIDATION,
    "verify": Stage.VALIDATION,
    "interaction": Stage.VALIDATION,
    "tolerance": Stage.VALIDATION,
    "layer": Stage.VALIDATION,
    "preserve": Stage.EDIT,
    "target": Stage.EDIT,
}
"""Our stages to the study's."""

_CRASHES = ("crash", "timeout", "error")
_UNCHECKED = (
    "not measured", "nothing compared", "missing corner", "embedding not compared", "impossible",
    "unreadable folder", "unreadable file", "malformed receipt", "malformed checkpoint",
    "not certain", "A/A beyond limit",
)  # fmt: skip
_WRONG = (
    "wrong distribution", "beyond a fixed tolerance", "unstable",
    "nan", "wrong value", "shape", "dtype", "missing output", "extra output", "introduced error",
    "not found", "the edit was lost", "half lost", "applied twice",
    "the edit was changed", "drift", "too little change",
    "too much change", "stale tensor", "swapped", "wrong tensor", "transposed", "scaled",
    "truncated", "rounded", "shifted", "element", "row", "column", "quantised", "missing tensor",
    "false claim", "extra file", "missing file", "changed file", "changed input", "changed header",
    "another base", "changed tensor",
)  # fmt: skip
SYMPTOMS = (
    dict.fromkeys(_CRASHES, Symptom.CRASH)
    | dict.fromkeys(_UNCHECKED, Symptom.NOT_CHECKED)
    | dict.fromkeys(_WRONG, Symptom.WRONG_MODEL)
)
"""Our symptoms to the study's."""

CAUSES = {
    "dtype": Cause.TYPE,
    "rounded": Cause.TYPE,
    "quantised": Cause.TYPE,
    "shape": Cause.SHAPE,
    "transposed": Cause.SHAPE,
    "truncated": Cause.SHAPE,
    "missing output": Cause.INCOMPATIBILITY,
    "extra output": Cause.INCOMPATIBILITY,
    "missing tensor": Cause.INCOMPATIBILITY,
    "stale tensor": Cause.API_MISUSE,
    "the edit was lost": Cause.API_MISUSE,
    "half lost": Cause.API_MISUSE,
    "applied twice": Cause.API_MISUSE,
    "another base": Cause.API_MISUSE,
    "changed input": Cause.API_MISUSE,
    "missing corner": Cause.MISCONFIGURATION,
    "swapped": Cause.ALGORITHM,
    "wrong tensor": Cause.ALGORITHM,
    "scaled": Cause.ALGORITHM,
    "shifted": Cause.ALGORITHM,
    "element": Cause.ALGORITHM,
    "row": Cause.ALGORITHM,
    "column": Cause.ALGORITHM,
    "drift": Cause.OTHER,
    "too little change": Cause.OTHER,
    "too much change": Cause.OTHER,
}
"""What a symptom says of its cause by itself; of the others nothing does but an operator."""

_TYPES = ("Cast", "CastLike", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_SHAPES = (
    "Reshape", "Transpose", "Expand", "Slice", "Concat", "Split", "Squeeze", "Unsqueeze", "Flatten",
    "Shape", "Tile", "Pad",
)  # fmt: skip


def classify(finding: Finding) -> tuple[Stage, Symptom, Cause]:
    """The study's classes of a finding; `unclear`, `unreported` and `unknown` for words that are
    none of ours."""
    stage = STAGES.get(finding.stage, Stage.UNKNOWN)
    symptom = SYMPTOMS.get(finding.symptom, Symptom.UNREPORTED)
    return stage, symptom, _cause(finding)


def _cause(finding: Finding) -> Cause:
    kind = re.split(r"\W", finding.operator, maxsplit=1)[0]
    if "whose weight" in finding.operator:
        return Cause.ALGORITHM
    if kind in _TYPES:
        return Cause.TYPE
    if kind in _SHAPES:
        return Cause.SHAPE
    return Cause.ALGORITHM if kind else CAUSES.get(finding.symptom, Cause.UNKNOWN)


def fingerprint(finding: Finding) -> str:
    """Twelve hexadecimal digits that stay where the fault stays.

    Made of our stage and symptom, the operator and the place, without numbers: the same fault in
    another layer, at another corner, on another batch, of another size of the model is the same.
    The error's magnitude is left out: it follows the inputs and the weights, and near a power of
    any base it would be one thing on one machine and another on the next.
    """
    parts = ["1", finding.stage, finding.symptom, _normal(finding.operator), place(finding)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def place(finding: Finding) -> str:
    """A finding's site without corner, batch and numbers: `model.layers.N.mlp.down_proj.weight`."""
    corners = (*CORNERS, *EDGES, *(f"{name} in float64" for name in CORNERS))
    parts = [part for part in finding.site.split("/") if part not in corners]
    if finding.stage in ("run", "interface"):
        parts = parts[:1]  # what follows the output is the batch that was the first to show it
    return _normal("/".join(parts))


def _normal(text: str) -> str:
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "N", text)


def issues(findings: Iterable[Finding]) -> tuple[Issue, ...]:
    """The findings by fingerprint, in the order of the first of each."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(fingerprint(finding), []).append(finding)
    return tuple(_issue(name, group) for name, group in groups.items())


def _issue(name: str, group: list[Finding]) -> Issue:
    stage, symptom, cause = classify(group[0])
    sites = tuple(dict.fromkeys(finding.site for finding in group))
    return Issue(name, stage, symptom, cause, len(group), sites, group[0].operator)
