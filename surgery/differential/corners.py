"""Running the corners, each model in a child of its own, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from surgery.differential.workload import Workload
from surgery.evidence import EDGES
from surgery.export.tasks import Task
from surgery.runtimes.child import Job, Limits, Outcome, run
from surgery.runtimes.interface import FLOAT32, Cut, ModelRef

Progress = Callable[[str], None]
"""Called with what is about to run."""


@dataclass(frozen=True)
class Pair:
    """A checkpoint folder and the ONNX file that is said to be it.

    `initializers`: another folder than the file's own in which its external data lies; `cuts`:
    where both come apart, in order, to be run part by part; none to be run whole.
    """

    model: Path
    onnx: Path
    initializers: Path | None = None
    cuts: tuple[Cut, ...] = ()

    @property
    def data(self) -> Path:
        """The folder in which the ONNX file's external data lies."""
        return self.initializers or self.onnx.parent


@dataclass(frozen=True)
class Ran:
    """The outcome of every corner, and of the float64 reference of every PyTorch corner.

    narrow: of PyTorch in the type its graph computes in, where that is not float32; cuts: where
    the models of each edge were cut.
    """

    corners: Mapping[str, Outcome]
    references: Mapping[str, Outcome]
    narrow: Mapping[str, Outcome] = field(default_factory=dict)
    cuts: Mapping[str, tuple[Cut, ...]] = field(default_factory=dict)

    def dtype(self, torch_corner: str) -> str:
        """What the graph of a PyTorch corner's conversion computes in."""
        onnx = self.corners.get(torch_corner.replace("T", "R"))
        return onnx.compute if onnx is not None else FLOAT32


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
    narrow: dict[str, Outcome] = {}
    before = earlier or Ran({}, {})
    for name, model in _models(pairs, task, workload, scratch):
        wide = model.dtype == "float64"
        found = references if wide else corners
        known = before.references if wide else before.corners
        progress(name if model.dtype == FLOAT32 else f"{name} in {model.dtype}")
        found[name] = _run(_job(model, workload, scratch, name), limits, known.get(name))
    ran = Ran(corners, references, narrow, {edge: pair.cuts for edge, pair in pairs.items()})
    for name, model in _narrow(pairs, task, ran):
        progress(f"{name} in {model.dtype}")
        job = _job(model, workload, scratch, name)
        narrow[name] = _run(job, limits, before.narrow.get(name))
    return ran


def _narrow(pairs: Mapping[str, Pair], task: Task, ran: Ran) -> Iterator[tuple[str, ModelRef]]:
    """PyTorch in the type each graph computes in, where that is not float32."""
    for edge, pair in pairs.items():
        name = EDGES[edge][0]
        if ran.dtype(name) != FLOAT32:
            yield name, ModelRef("torch-streamed", pair.model, task.name, ran.dtype(name))


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


def _models(
    pairs: Mapping[str, Pair], task: Task, workload: Workload, scratch: Path
) -> Iterator[tuple[str, ModelRef]]:
    for edge, pair in pairs.items():
        torch, onnx = EDGES[edge]
        # Every new token would read a streamed model once more.
        whole = bool(workload.generations) and not pair.cuts
        runtime = "torch" if whole else "torch-streamed"
        yield torch, ModelRef(runtime, pair.model, task.name, cuts=pair.cuts)
        yield torch, ModelRef("torch-streamed", pair.model, task.name, "float64", cuts=pair.cuts)
        yield (
            onnx,
            ModelRef(
                "onnxruntime-streamed" if pair.cuts else "onnxruntime",
                pair.onnx,
                task.name,
                initializers=pair.initializers,
                cuts=pair.cuts,
                given=_folder(scratch, torch, "float32") if pair.cuts else None,
            ),
        )


def _folder(scratch: Path, corner: str, dtype: str) -> Path:
    return scratch / f"{corner}-{dtype}"


def _job(model: ModelRef, workload: Workload, scratch: Path, name: str) -> Job:
    folder = _folder(scratch, name, model.dtype)
    if model.dtype != FLOAT32:
        return Job(model, folder, workload.batches)
    return Job(
        model,
        folder,
        workload.batches,
        embedding_rows=workload.vocab,
        generations=workload.generations,
        continuations=tuple(answer.tokens for answer in workload.answers),
    )
