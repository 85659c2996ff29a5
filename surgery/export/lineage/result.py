"""What was found out about initializers and tensors, and how it is written down.

The JSON of a result is also the form of `lineage.json`, the note an exporter leaves beside a graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.export.expressions import Expression, kinds

PROVEN = "proven"
AMBIGUOUS = "ambiguous"
CONSTANT = "constant"
UNMATCHED = "unmatched"
MISMATCH = "mismatch"


@dataclass(frozen=True)
class Row:
    """One initializer.

    status: `proven` (equal to `expression` bit for bit), `ambiguous` (equal to several tensors,
    and nothing says which was meant), `constant` (of the graph), `unmatched` (like no tensor, but
    of the shape of one) or `mismatch` (should be `expression` and is not: a finding says how).
    `tensors` are all whose contents it holds, or should hold; `transform` names what was done to
    them, innermost first.
    """

    name: str
    status: str
    tensors: tuple[str, ...] = ()
    transform: tuple[str, ...] = ()
    expression: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls, name: str, status: str, expression: Expression, tensors: tuple[str, ...] = ()
    ) -> Row:
        named = tensors or expression.tensors()
        return cls(name, status, named, kinds(expression), expression.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "status": self.status,
            "tensors": list(self.tensors),
            "transform": list(self.transform),
            "expression": self.expression,
        }


@dataclass(frozen=True)
class Fault:
    """One thing wrong: `symptom` is a word of `diagnosis.SYMPTOMS`; a missing tensor has no
    initializer."""

    symptom: str
    initializer: str | None
    tensor: str | None
    message: str

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Lineage:
    """Every initializer in the file's order, why tensors that none holds are unused, and what is
    wrong."""

    onnx: str
    model: str
    rows: tuple[Row, ...]
    unused: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Fault, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every initializer is a proven tensor or a constant, and no tensor is missing."""
        return not self.findings and all(row.status != UNMATCHED for row in self.rows)

    def held(self) -> dict[str, list[str]]:
        """The initializers of each tensor that one holds, or should hold."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            for tensor in row.tensors:
                found.setdefault(tensor, []).append(row.name)
        return found

    def to_json(self) -> dict[str, Any]:
        unused = {tensor: {"unused": reason} for tensor, reason in self.unused.items()}
        return {
            "onnx": self.onnx,
            "model": self.model,
            "initializers": [row.to_json() for row in self.rows],
            "tensors": {**self.held(), **unused},
            "findings": [finding.to_json() for finding in self.findings],
        }
