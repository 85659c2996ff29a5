"""Edited models whose conversion holds none of the edit, half of it, or all of it twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from here import in_this_process
from recipes import apply_edits

from surgery.export import export
from surgery.gate import RHO_NAMES
from tests.differential import mutants
from tests.localize.bases import Base

LOST, HALF, TWICE = (RHO_NAMES[rho] for rho in (-1.0, -0.5, 1.0))

EDITS: dict[str, list[dict[str, Any]]] = {
    "heads zeroed": [{"op": "heads", "heads": ["L0H1", "L1H2"], "factor": 0.0}],
    "heads to 95%": [{"op": "heads", "heads": ["L0H1", "L1H2"], "factor": 0.95}],
    "neurons zeroed": [{"op": "neurons", "neurons": ["L0N3", "L1N40"], "factor": 0.0}],
    "neurons to 90%": [{"op": "neurons", "neurons": ["L0N3", "L1N40"], "factor": 0.9}],
}
"""Large ones, whose effect is far from linear, and small ones."""


@dataclass(frozen=True)
class Edited:
    """A model's edited twin: its checkpoint, its export, and the tensors the edit changed."""

    base: Base
    model: Path
    onnx: Path
    again: Path | None
    tensors: tuple[str, ...]

    @classmethod
    @cache
    def make(cls, base: Base, name: str) -> Edited:
        """`again`: the export of the recipe applied to the edited model, if that changes it."""
        folder = base.root / name.replace(" ", "-").replace("%", "")
        edited = apply_edits(folder / "once", base.model, EDITS[name])
        twice = apply_edits(folder / "twice", edited, EDITS[name])
        with in_this_process():
            files = [
                export(model, folder / f"onnx-{n}", task=base.task.name).model
                for n, model in enumerate((edited, twice))
            ]
        differs = list(_changed(files[0], files[1]))
        tensors = tuple(_changed(base.onnx, files[0]))
        return cls(base, edited, files[0], files[1] if differs else None, tensors)

    def times(self, path: Path, times: float, tensors: tuple[str, ...], hidden: bool) -> Path:
        """The edited export with original + `times` x the edit in `tensors`; `hidden`: under
        names and in an order that lineage does not know."""
        before, after = (onnx.load(str(file)) for file in (self.base.onnx, self.onnx))
        for name in tensors:
            old, new = mutants.weight(before, name), mutants.weight(after, name)
            mutants.put(after, name, old + np.float32(times) * (new - old))
        return _saved(after, path, self.tensors if hidden else ())


def _changed(one: Path, other: Path) -> Iterator[str]:
    before, after = (onnx.load(str(path)) for path in (one, other))
    for tensor in before.graph.initializer:
        name = tensor.name.removesuffix(".T")
        if not np.array_equal(mutants.weight(before, name), mutants.weight(after, name)):
            yield name


def _saved(model: onnx.ModelProto, path: Path, hidden: tuple[str, ...]) -> Path:
    for number, name in enumerate(hidden):
        mutants.reverse_rows(model, name, f"onnx::MatMul_{number}")
    onnx.save(model, str(path))
    return path


Plant = Callable[[Edited, Path], Path | None]


def _all(times: float, hidden: bool) -> Plant:
    return lambda of, path: of.times(path, times, of.tensors, hidden)


def _some(of: Edited, path: Path) -> Path | None:
    """Every second tensor is the original's."""
    return of.times(path, 0.0, of.tensors[::2], False) if len(of.tensors) > 1 else None


def _original(of: Edited, path: Path) -> Path:
    return of.base.onnx


def _again(of: Edited, path: Path, hidden: bool) -> Path | None:
    if of.again is None:
        return None
    return _saved(onnx.load(str(of.again)), path, of.tensors if hidden else ())


FAULTS: dict[str, tuple[Plant, str]] = {
    "the original's file": (_original, LOST),
    "no tensor edited, unknown to lineage": (_all(0.0, True), LOST),
    "every second tensor stale": (_some, LOST),
    "half the edit": (_all(0.5, False), HALF),
    "half the edit, unknown to lineage": (_all(0.5, True), HALF),
    "twice the edit": (_all(2.0, False), TWICE),
    "twice the edit, unknown to lineage": (_all(2.0, True), TWICE),
    "edited again": (partial(_again, hidden=False), TWICE),
    "edited again, unknown to lineage": (partial(_again, hidden=True), TWICE),
}
"""What the edited model's file holds, and what must be said of it."""
