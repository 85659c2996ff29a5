"""Corners in this process, to be quick: exports that share one capture, runs that share one torch.

What a child process adds (limits, isolation) is tested elsewhere; what runs in it is the same
code, `surgery.runtimes.worker.work`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from models import config_of, make
from recipes import HEADS, NEURONS, apply_edits

from surgery import process
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
    """Exports of random models; a graph depends on the config alone, so it is captured once."""

    def __init__(self) -> None:
        self._graphs: dict[str, Any] = {}

    def export(self, model: Path, folder: Path, task: str | None = None) -> Path:
        """`model.onnx` in the new folder `folder`, as `surgery.export.export` binds it."""
        import onnx_ir

        from surgery.export.bind import bind
        from surgery.export.capture import capture
        from surgery.export.quiet import quiet
        from surgery.export.tasks import choose_task

        wanted = choose_task(model, task).name
        key = json.dumps([wanted, {**config_of(model), "dtype": "any"}], sort_keys=True)
        if key not in self._graphs:
            self._graphs[key] = capture(model, wanted)
        bind(self._graphs[key], model)
        folder.mkdir(parents=True)
        with quiet():
            onnx_ir.save(self._graphs[key], folder / "model.onnx", external_data="weights")
        return folder / "model.onnx"

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
    """Stands in for `process.run`: does a child's work in this process; torch's only once."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self._endings: dict[str, Ending] = {}

    def __call__(
        self, module: str, arguments: dict[str, Any], folder: Path, limits: Limits
    ) -> Ending:
        if arguments.get("model", {}).get("runtime") != "torch":
            return _work(module, arguments)
        key = _key(arguments, folder)
        if key not in self._endings:
            self._endings[key] = _work(module, arguments)
            shutil.copytree(folder, self.cache / key)
        shutil.copytree(self.cache / key, folder, dirs_exist_ok=True)
        return self._endings[key]

    @contextmanager
    def installed(self) -> Iterator[Here]:
        with patch.object(process, "run", self):
            yield self


def _key(arguments: dict[str, Any], folder: Path) -> str:
    own = {name: value for name, value in arguments.items() if name != "scratch"}
    hasher = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    for path in sorted(folder.glob("batch-*.npz")):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()


def _work(module: str, arguments: dict[str, Any]) -> Ending:
    started = time.monotonic()
    try:
        result = json.loads(json.dumps(import_module(module).work(arguments)))
    except Exception as error:
        told = process._describe(error)
        seconds = time.monotonic() - started
        return Ending(told["status"], told["detail"], seconds, 1, told["kind"], told["error"])
    return Ending("ok", "", time.monotonic() - started, 1, result=result)
