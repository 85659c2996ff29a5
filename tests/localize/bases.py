"""What faults are planted in: a model, its export, and what seeds need to know of both."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
from corners import Here
from here import in_this_process
from models import deep, make

from surgery import pipeline
from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.export import choose_task, export
from surgery.export.lineage import trace
from surgery.export.tasks import Task
from surgery.localize import Localization
from surgery.pipeline import causes
from surgery.pipeline.pairs import ask
from surgery.policy import BUILT_IN
from surgery.report import Report
from tests.localize.effects import Outputs, effect, outputs, unseen
from tests.localize.seeds import SEEDS, Target, Truth

VOCAB = 200
LAYERS = 3
CACHED = "causal-lm-with-past"
FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


@dataclass(frozen=True)
class Subject:
    """A random model of a family with config `fields`, or a trained one from the fixtures;
    `other`: the fixture that is the same model with other weights; exported for `task`."""

    family: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    fixture: str = ""
    other: str = ""


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "gpt2": {}, "qwen3": {}, "bert": {}, "gemma2": {"sliding_window": 8},
    "mistral": {"sliding_window": 8}, "phi3": {}, "gpt_neox": {}, "opt": {}, "mixtral": {},
    "bloom": {}, "falcon-new": {},
}  # fmt: skip
"""Random models that faults are planted in, with config fields."""

SUBJECTS: dict[str, Subject] = {
    **{name: Subject(name, fields) for name, fields in FAMILIES.items()},
    "capitals-gpt2": Subject(fixture="capitals-gpt2"),
    "polyglot-llama": Subject(fixture="polyglot-llama", other="polyglot-llama-tuned"),
    **{f"{n} with cache": Subject(n, FAMILIES[n], CACHED) for n in ("llama", "gpt2", "qwen3")},
}
"""All models of the campaign; those with a cache get the faults of caches."""


@dataclass(eq=False)
class Base:
    """A model, its portable export, and its twin of other weights."""

    name: str
    model: Path
    onnx: Path
    root: Path
    here: Here
    other: Path
    task: Task
    _clean: dict[Path, Outputs] = field(default_factory=dict)
    _noise: dict[str, float] = field(default_factory=dict)

    @classmethod
    def make(
        cls, name: str, root: Path, here: Here, fields: Any = None, layers: int = LAYERS
    ) -> Base:
        subject = SUBJECTS[name] if fields is None else Subject(name, fields)
        folder = root / name.replace(" ", "-")
        model, other = _models(subject, folder, layers)
        with in_this_process():
            made = export(model, folder / "onnx", task=subject.task).model
        return cls(name, model, made, folder, here, other, choose_task(model, subject.task))

    @property
    def layers(self) -> int:
        return identify(Checkpoint.open(self.model)).sizes["layers"]

    def target(self, layer: int) -> Target:
        checkpoint, other = Checkpoint.open(self.model), Checkpoint.open(self.other)
        arch = identify(checkpoint)
        with in_this_process():
            rows = trace(self.onnx, self.model).rows
        known = {"none", "transpose", "cast"}
        plain = [row for row in rows if row.tensors and set(row.transform) <= known]
        tensors = {row.tensors[0]: (row.name, "transpose" in row.transform) for row in plain}
        roles = {t: (role.role, role.layer) for t, role in arch.roles.items() if t in tensors}
        model = onnx.load(str(self.onnx))
        return Target(model, layer, tensors, roles, other.read, dict(arch.sizes))

    def plant(self, kind: str, fault: str, layer: int) -> tuple[Path, Truth]:
        """A file with the fault in it, and where it is; raises `Unfit`."""
        target = self.target(layer)
        truth = SEEDS[kind][fault](target)
        path = self.root / "planted.onnx"
        onnx.save(target.model, str(path))
        return path, truth

    def run(self, path: Path, **given: Any) -> tuple[Report, list[Localization]]:
        """`pipeline.diff` of a file, and what it localised."""
        kept: list[Localization] = []
        find = causes.find

        def keep(*args: Any) -> Localization:
            kept.append(find(*args))
            return kept[-1]

        with self.here.installed(), patch.object(causes, "find", keep):
            report = pipeline.diff(self.model, onnx=path, **given)
        return report, kept

    def effect(self, path: Path, right: Path | None = None) -> float:
        """max |mutant - right| over the noise, on what the oracle is asked and on more; `right`:
        the export itself, if no other."""
        self._noise = self._noise or self._measured()
        file = right or self.onnx
        if file not in self._clean:
            self._clean[file] = self.outputs(file)
        return effect(self._clean[file], self.outputs(path), self._noise)

    def outputs(self, path: Path) -> Outputs:
        arch = identify(Checkpoint.open(self.model))
        asked = ask(self.model, (), BUILT_IN, self.task.name, pipeline.DEFAULT_SEED)
        more = unseen(arch.sizes["vocab"], arch.sizes["positions"], self.task)
        return outputs(path, self.task, [*asked.workload.batches, *more])

    def _measured(self) -> dict[str, float]:
        """PyTorch's float32 noise by output; that of the one cache that is told for all."""
        report, _ = self.run(self.onnx)
        found = {row.output: row.noise_max for row in report.evidence().conversion}
        return {**found, "": found.get(self._told_cache(found), found[self.task.output])}

    def _told_cache(self, found: dict[str, float]) -> str:
        return next((name for name in found if name != self.task.output), self.task.output)


def _models(subject: Subject, folder: Path, layers: int) -> tuple[Path, Path]:
    """The model and its twin of other weights."""
    if not subject.fixture:
        sizes = {"vocab_size": VOCAB, **deep(subject.family, layers), **subject.fields}
        model = make(subject.family, folder / "model", **sizes)
        return model, make(subject.family, folder / "other", seed=7, **sizes)
    model = _copied(FIXTURES / subject.fixture, folder / "model")
    if subject.other:
        return model, _copied(FIXTURES / subject.other, folder / "other")
    return model, _shaken(model, folder / "other")


def _copied(source: Path, folder: Path) -> Path:
    """The checkpoint's own files: what lies beside them is no part of it."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".safetensors"):
            shutil.copy(file, folder / file.name)
    return folder


def _shaken(model: Path, folder: Path) -> Path:
    """The same model with every weight a tenth of its spread away."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(model, folder)
    generator = np.random.default_rng(7)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, values in tensors.items():
            noise = generator.normal(size=values.shape) * values.std() / 10
            tensors[name] = (values + noise).astype(values.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder
