"""One model's whole run in a child process: whatever it does, the parent gets an `Outcome`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import surgery.errors
from surgery import process
from surgery.errors import EnvironmentFault, InputError, quote
from surgery.process import Limits
from surgery.runtimes.forced import Continuation
from surgery.runtimes.generate import Generated, Generation, RunnerUp
from surgery.runtimes.interface import FLOAT32, PART, ModelRef, stream_file
from surgery.stimuli.interface import Batch

__all__ = ["Facts", "Generated", "Generation", "Job", "Limits", "Outcome", "OutputFact", "run"]

KEPT = "kept"
"""The wanted output's name in the file of what a batch kept; caches have their own."""

FIELDS = ("input_ids", "attention_mask", "position_ids", "selected")


@dataclass(frozen=True)
class Job:
    """What one child does with one model; `scratch` is an empty folder the caller owns.

    output: the output kept at each batch's `selected` positions, by default the task's;
    embedding_rows: rows 0 to this of the token embedding are looked up, `embedding_chunk` at a
    time; threads: of the runtime, by default `default_threads()`; first: how many batches earlier
    jobs of the same model have left in `scratch`.
    """

    model: ModelRef
    scratch: Path
    batches: tuple[Batch, ...] = ()
    output: str | None = None
    embedding_rows: int = 0
    embedding_chunk: int = 4096
    generations: tuple[Generation, ...] = ()
    continuations: tuple[Continuation, ...] = ()
    threads: int | None = None
    first: int = 0


@dataclass(frozen=True)
class OutputFact:
    """One output of one batch; `nonfinite` counts NaN and infinite values at real positions,
    `padded` those under padding."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nonfinite: int
    padded: int = 0


@dataclass(frozen=True)
class Facts:
    """All outputs of one batch; `problem` says why the wanted one could not be kept."""

    outputs: tuple[OutputFact, ...]
    problem: str | None


@dataclass(frozen=True)
class Outcome:
    """How a job ended, and its results, read from `scratch` when asked for.

    status: `ok`, `crash`, `timeout` or `error`; detail: one line, safe to print; kind: of an
    error, `input` when the model file itself is bad (exit 2), `environment`, or empty;
    peak_bytes: the child's peak resident memory; threads: the number it was given.
    """

    status: str
    detail: str
    seconds: float
    peak_bytes: int
    threads: int
    scratch: Path
    kind: str = ""
    error: str = ""
    names: tuple[str, ...] = ()
    result: dict[str, Any] = field(default_factory=dict, repr=False)

    def then(self, later: Outcome) -> Outcome:
        """This run and a later one of the same model in the same `scratch`, as one.

        Rows of the embedding are the first one's. If the later one did not end well, neither did
        the whole.
        """
        seconds = self.seconds + later.seconds
        peak = max(self.peak_bytes, later.peak_bytes)
        if later.status != "ok":
            return replace(later, seconds=seconds, peak_bytes=peak)
        result = dict(self._result())
        for name in ("batches", "generations", "continuations", "busy"):
            result[name] = result[name] + later.result[name]
        names = self.names + later.names
        return replace(self, seconds=seconds, peak_bytes=peak, names=names, result=result)

    @property
    def busy(self) -> float:
        """Seconds spent on batches alone, without starting, loading and all else."""
        return float(self._result()["busy"])

    def raise_bad_input(self) -> None:
        """Raises the child's own `InputError` again, if that is how it ended."""
        if self.kind == "input":
            known = getattr(surgery.errors, self.error, InputError)
            raise known(self.detail)

    def facts(self, batch_name: str) -> Facts:
        """Names, dtypes and shapes of a batch's outputs, and how many values are not finite."""
        found = self._batch(batch_name)
        outputs = [OutputFact(**{**o, "shape": tuple(o["shape"])}) for o in found["outputs"]]
        return Facts(tuple(outputs), found["problem"])

    def outputs(self, batch_name: str) -> NDArray[Any]:
        """The kept output at `selected`, [n, V]; float64 from the float64 reference, else float32.

        Raises `EnvironmentFault` when it could not be kept: see `facts(batch_name).problem`.
        """
        return self._kept(batch_name, lambda name: name == KEPT)[KEPT]

    def caches(self, batch_name: str) -> dict[str, NDArray[Any]]:
        """Every kept `present.N.key|value` at `selected`, [n, heads · size], of the dtypes of
        `outputs`. Of a task without a cache there is none."""
        return self._kept(batch_name, lambda name: name not in (KEPT, PART))

    def part(self, batch_name: str) -> NDArray[Any] | None:
        """What the last part of a streamed graph makes of PyTorch's values, where it was run from
        them, as `outputs` has its own."""
        return self._kept(batch_name, lambda name: name == PART).get(PART)

    def stream(self, kind: str, batch_name: str, cut: int) -> NDArray[Any] | None:
        """The residual stream of a batch at the cut of that number, [batch, length, width], where
        it was kept; see `streamed.stream_file`."""
        path = self.scratch / stream_file(kind, self.names.index(batch_name), cut)
        return np.load(path, allow_pickle=False) if path.exists() else None

    def _kept(self, batch_name: str, wanted: Callable[[str], bool]) -> dict[str, NDArray[Any]]:
        problem = self._batch(batch_name)["problem"]
        if problem:
            raise EnvironmentFault(f"batch {quote(batch_name)}: {problem}")
        path = self.scratch / kept_file(self.names.index(batch_name))
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if wanted(name)}

    @property
    def compute(self) -> str:
        """The float type the model computed in, as its runtime tells; float32 if it did not end."""
        found: str = self.result.get("compute", FLOAT32)
        return found

    @property
    def embedding_problem(self) -> str | None:
        """Why there are no embedding rows although they were asked for."""
        problem: str | None = self._result()["embedding_problem"]
        return problem

    def embedding(self) -> NDArray[Any]:
        """The embedding rows [V, d] as a read-only memory map; `EnvironmentFault` without any."""
        if self.embedding_problem:
            raise EnvironmentFault(self.embedding_problem)
        rows: NDArray[Any] = np.load(self.scratch / "embedding.npy", mmap_mode="r")
        return rows

    def generations(self) -> tuple[Generated, ...]:
        """What each requested `Generation` gave, in order."""
        return tuple(
            Generated(
                tuple(tuple(row) for row in found["tokens"]),
                found["nonfinite"],
                tuple(tuple(RunnerUp(*one) for one in row) for row in found["runners"]),
            )
            for found in self._result()["generations"]
        )

    def continuations(self) -> tuple[tuple[float, ...], ...]:
        """The log-probability of each following token of each `Continuation`, in order; none of a
        model without logits."""
        return tuple(tuple(row) for row in self._result()["continuations"])

    def _batch(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._result()["batches"][self.names.index(name)]
        return found

    def _result(self) -> dict[str, Any]:
        if self.status != "ok":
            raise EnvironmentFault(f"the run has no results: {self.status}: {self.detail}")
        return self.result


def run(job: Job, limits: Limits) -> Outcome:
    """Run `job` in a child of its own; never raises for what the child does."""
    names = tuple(batch.name for batch in job.batches)
    if len(set(names)) != len(names):
        raise ValueError("two batches have the same name")
    threads = job.threads or default_threads()
    for number, batch in enumerate(job.batches, start=job.first):
        arrays = {name: getattr(batch, name) for name in FIELDS} | {"split": batch.split}
        np.savez(job.scratch / batch_file(number), **arrays)
    ending = process.run("surgery.runtimes.worker", _arguments(job, threads), job.scratch, limits)
    return Outcome(
        status=ending.status,
        detail=ending.detail,
        seconds=ending.seconds,
        peak_bytes=ending.peak_bytes,
        threads=threads,
        scratch=job.scratch,
        kind=ending.kind,
        error=ending.error,
        names=names,
        result=ending.result,
    )


def _arguments(job: Job, threads: int) -> dict[str, Any]:
    model = job.model
    folder = model.initializers
    return {
        "model": {
            "runtime": model.runtime,
            "path": str(model.path.absolute()),
            "task": model.task,
            "dtype": model.dtype,
            "initializers": str(folder.absolute()) if folder else None,
            "cuts": [vars(cut) for cut in model.cuts],
            "given": str(model.given.absolute()) if model.given else None,
            "attention": model.attention,
            "stored": model.stored,
            "level": model.level,
        },
        "scratch": str(job.scratch.absolute()),
        "first": job.first,
        "batches": len(job.batches),
        "output": job.output,
        "embedding_rows": job.embedding_rows,
        "embedding_chunk": job.embedding_chunk,
        "generations": [vars(generation) for generation in job.generations],
        "continuations": [vars(continuation) for continuation in job.continuations],
        "threads": threads,
    }


def default_threads() -> int:
    """`OMP_NUM_THREADS` where it is set to a number, else the CPUs this process may use."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() and int(text) > 0 else len(os.sched_getaffinity(0))


def batch_file(number: int) -> str:
    return f"batch-{number}.npz"


def kept_file(number: int) -> str:
    return f"kept-{number}.npz"
