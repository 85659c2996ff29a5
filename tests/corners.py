"""Corners in this process, to be quick: exports without a child, runs that share one torch.

What a child process adds (limits, isolation) is tested elsewhere; what runs in it is the same
code, `surgery.runtimes.worker.work`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from here import in_this_process, run_here
from models import make
from recipes import HEADS, NEURONS, apply_edits

from surgery import process
from surgery.export import trace
from surgery.export.tasks import Task
from surgery.process import Ending, Limits

VOCAB = 200
"""Above 127, so that an overflow of int8 shows."""

EDITS = (HEADS, NEURONS)


@dataclass(frozen=True)
class Case:
    """A model and its edited twin, each with its ONNX file."""

    model: Path
    edited: Path
    onnx: Path
    edited_onnx: Path


class Exporter:
    """Portable exports of random models; a graph depends on the config alone, so the cache of
    captured graphs has it from the second model on."""

    def export(self, model: Path, folder: Path, task: str | None = None) -> Path:
        """`model.onnx` in the new folder `folder`."""
        from surgery.export import export

        folder.parent.mkdir(parents=True, exist_ok=True)
        with in_this_process():
            return export(model, folder, task=task).model

    def case(
        self, root: Path, family: str, seed: int = 0, task: str | None = None, **overrides: Any
    ) -> Case:
        """A random model in the new folder `root`, edited by `EDITS`, and both exported."""
        model = make(family, root / "model", seed, **{"vocab_size": VOCAB, **overrides})
        edited = apply_edits(root, model, EDITS)
        return Case(
            model,
            edited,
            self.export(model, root / "onnx", task),
            self.export(edited, root / "edited-onnx", task),
        )


class Here:
    """Stands in for `process.run`: does a child's work in this process; torch's only once.

    A model's exported program gives what the model gives, which `tests/localize/test_program.py`
    holds it to: unless `captures`, the model is run in its place, for a capture takes seconds.
    """

    def __init__(self, cache: Path, captures: bool = False) -> None:
        self.cache, self._captures = cache, captures
        self._endings: dict[str, Ending] = {}
        self._programs: dict[tuple[str, Path], Any] = {}

    def __call__(
        self, module: str, arguments: dict[str, Any], folder: Path, limits: Limits
    ) -> Ending:
        if arguments.get("action") == "exported" and not self._captures:
            arguments = {**arguments, "action": "torch", "dtype": "float32", "caches": False}
        if arguments.get("action") in ("torch", "exported"):
            return self._boundaries(module, arguments, folder, limits)
        model = arguments.get("model", {})
        if isinstance(model, str) or "torch" not in model.get("runtime", ""):
            return run_here(module, arguments, folder, limits)
        key = _key(arguments, folder)
        if key not in self._endings:
            self._endings[key] = run_here(module, arguments, folder, limits)
            shutil.copytree(folder, self.cache / key)
        shutil.copytree(self.cache / key, folder, dirs_exist_ok=True)
        return self._endings[key]

    def _boundaries(
        self, module: str, arguments: dict[str, Any], folder: Path, limits: Limits
    ) -> Ending:
        """PyTorch's values at boundaries, which are the same whatever graph they are for."""
        names = ("action", "model", "dtype", "task", "caches")
        own = {name: arguments.get(name) for name in names}
        own["sites"] = [{**b, "value": ""} for b in arguments["boundaries"]]
        hasher = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
        for name in ("batch", "given"):
            hasher.update(_content(Path(arguments[name])))
        kept = self.cache / f"{hasher.hexdigest()}.npz"
        if not kept.exists():
            ending = run_here(module, arguments, folder, limits)
            if ending.status != "ok":
                return ending
            self.cache.mkdir(parents=True, exist_ok=True)
            shutil.copy(arguments["save"], kept)
        shutil.copy(kept, arguments["save"])
        return Ending("ok", "", 0.0, 1)

    @contextmanager
    def installed(self) -> Iterator[Here]:
        with (
            patch.object(process, "run", self),
            patch.object(trace, "exported_program", self._exported_program),
        ):
            yield self

    def _exported_program(self, model: Any, task: Task, opset: int, source: Path) -> Any:
        """A model's program, captured once."""
        key = (task.name, source)
        if key not in self._programs:
            self._programs[key] = _capture(model, task, opset, source)
        return self._programs[key]


_capture = trace.exported_program


def _content(path: Path) -> bytes:
    """The arrays of a file, whose archive also holds the time."""
    with np.load(path, allow_pickle=False) as archive:
        return b"".join(name.encode() + archive[name].tobytes() for name in sorted(archive.files))


def _key(arguments: dict[str, Any], folder: Path) -> str:
    own = {name: value for name, value in arguments.items() if name != "scratch"}
    hasher = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    for path in sorted(folder.glob("batch-*.npz")):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()
