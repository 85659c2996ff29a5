"""What came of one mutant or one clean variant, and how that is kept between runs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.localize.seeds import SEEDS

CATCH = 10.0
"""Errors above this many times the noise must be caught."""
CLEAN, NOT_MADE, EDIT = "clean", "not made", "edit"
"""Kinds of outcomes that are no seeded fault of a conversion."""

ROOT = Path(__file__).resolve().parents[2]
Key = tuple[str, str, int]
"""Kind, name and depth."""


@dataclass(frozen=True)
class Outcome:
    """One mutant: `effect` is max |mutant - clean| over the noise, infinite where it does not run;
    `named` is what was said of it; `layer`, `module` and `operator`: whether rightly, None where
    there is nothing to localise; `as_such`: whether what became of an edit was said; `digest`: of
    the mutant's file."""

    model: str
    kind: str
    fault: str
    depth: int
    effect: float
    verdict: str
    symptoms: tuple[str, ...]
    sites: str
    named: str
    layer: bool | None = None
    module: bool | None = None
    operator: bool | None = None
    confirmed: bool | None = None
    as_such: bool | None = None
    digest: str = ""

    @property
    def caught(self) -> bool:
        return self.verdict == "fail"

    @property
    def strong(self) -> bool:
        return self.effect > CATCH

    @property
    def key(self) -> Key:
        """What was tried; a variant that could not be made is asked for as a clean one."""
        return (CLEAN if self.kind == NOT_MADE else self.kind), self.fault, self.depth

    def __str__(self) -> str:
        """In a line, for whoever waits."""
        told = (self.layer, self.module, self.operator, self.confirmed, self.as_such)
        marks = ["-" if mark is None else ("no", "yes")[mark] for mark in told]
        what = f"{self.model} {self.kind} {self.fault} {self.depth}"
        return f"{what}: {self.effect:.3g} {self.verdict} {' '.join(marks)}"

    def to_json(self) -> dict[str, Any]:
        finite = math.isfinite(self.effect)
        return {**asdict(self), "effect": self.effect if finite else str(self.effect)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Outcome:
        changed = {"effect": float(fields["effect"]), "symptoms": tuple(fields["symptoms"])}
        return cls(**{**fields, **changed})


def mutants(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Those of seeded faults in a conversion."""
    return [o for o in outcomes if o.kind in SEEDS]


class Store:
    """The outcomes of one model in the folder `folder`, a line each, written as they come; those
    of other code are forgotten."""

    def __init__(self, folder: Path, model: str) -> None:
        self._file = folder / f"{model.replace(' ', '-')}.jsonl"
        self._head = json.dumps({"code": code_digest()})

    def read(self) -> dict[Key, Outcome]:
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        if not lines or lines[0] != self._head:
            return {}
        found = (Outcome.from_json(json.loads(line)) for line in lines[1:] if line.endswith("}"))
        return {outcome.key: outcome for outcome in found}

    def begin(self, kept: Iterable[Outcome]) -> None:
        """The file with what is kept of an earlier run, and nothing else."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        lines = [self._head, *(json.dumps(outcome.to_json()) for outcome in kept)]
        self._file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def add(self, outcome: Outcome) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(outcome.to_json()) + "\n")


def code_digest() -> str:
    """SHA-256 of everything that can change an outcome: the package and the campaign."""
    hasher = hashlib.sha256()
    for file in sorted(_code()):
        hasher.update(file.relative_to(ROOT).as_posix().encode())
        hasher.update(file.read_bytes())
    return hasher.hexdigest()


def _code() -> Iterator[Path]:
    helpers = ("corners.py", "here.py", "models.py", "recipes.py", "differential/mutants.py")
    yield from (ROOT / "surgery").rglob("*.py")
    yield from (ROOT / "surgery").rglob("*.json")
    own = (ROOT / "tests" / "localize").rglob("*.py")
    yield from (f for f in own if not f.name.startswith(("test_", "conftest", "tables")))
    yield from (ROOT / "tests" / name for name in helpers)
