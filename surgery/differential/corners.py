"""Running the corners, each model in a child of its own, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.differential.workload import Workload
from surgery.evidence import EDGES
from surgery.export.tasks import Task
from surgery.runtimes.child import Job, Limits, Outcome, run
from surgery.runtimes.interface import ModelRef

Progress = Callable[[str], None]
"""Called with what is about to run."""


@dataclass(frozen=True)
class Pair:
    """A checkpoint folder and the ONNX file that is said to be it.

    `initializers`: another folder than the file's own in which its external data lies.
    """

    model: Path
    onnx: Path
    initializers: Path | None = None

    @property
    def data(self) -> Path:
        """The folder in which the ONNX file's external data lies."""
        return self.initializers or self.onnx.parent


@dataclass(frozen=True)
class Ran:
    """The outcome of every corner, and of the float64 reference of every PyTorch corner."""

    corners: Mapping[str, Outcome]
    references: Mapping[str, Outcome]


def run_corners(
    pairs: Mapping[str, Pair],
    task: Task,
    workload: Workload,
    scratch: Path,
    limits: Limits,
    progress: Progress,
    earlier: Ran | None = None,
) -> Ran:
    """Runs both corners of every edge in `pairs` (`C_o`, `C_e`) and their references.

    After an `earlier` run in the same `scratch`, what that gave and what this gives; a corner that
    did not end well is not run again. Raises the child's own `InputError` where a model file is
    bad; any other end is an outcome.
    """
    corners: dict[str, Outcome] = {}
    references: dict[str, Outcome] = {}
    for name, model in _models(pairs, task):
        reference = model.dtype == "float64"
        progress(f"{name} in float64" if reference else name)
        if reference:
            found, before = references, earlier.references if earlier else {}
        else:
            found, before = corners, earlier.corners if earlier else {}
        found[name] = _run(_job(model, workload, scratch, name), limits, before.get(name))
    return Ran(corners, references)


def _run(job: Job, limits: Limits, before: Outcome | None) -> Outcome:
    if before is None:
        job.scratch.mkdir()
    elif before.status != "ok":
        return before
    else:
        job = replace(job, first=len(before.names), embedding_rows=0)
    outcome = run(job, limits)
    outcome.raise_bad_input()
    return before.then(outcome) if before else outcome


def _models(pairs: Mapping[str, Pair], task: Task) -> Iterator[tuple[str, ModelRef]]:
    for edge, pair in pairs.items():
        torch_corner, onnx_corner = EDGES[edge]
        yield torch_corner, ModelRef("torch", pair.model, task.name)
        yield torch_corner, ModelRef("torch", pair.model, task.name, "float64")
        yield (
            onnx_corner,
            ModelRef("onnxruntime", pair.onnx, task.name, initializers=pair.initializers),
        )


def _job(model: ModelRef, workload: Workload, scratch: Path, name: str) -> Job:
    folder = scratch / f"{name}-{model.dtype}"
    if model.dtype == "float64":
        return Job(model, folder, workload.batches)
    return Job(
        model,
        folder,
        workload.batches,
        embedding_rows=workload.vocab,
        generations=workload.generations,
    )
