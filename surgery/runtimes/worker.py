"""The child of `surgery.runtimes.child`: `python -m surgery.runtimes.worker job.json`."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery import process
from surgery.errors import OnnxError
from surgery.export.tasks import find_task
from surgery.runtimes import RUNTIMES
from surgery.runtimes.child import KEPT, batch_file, kept_file
from surgery.runtimes.forced import Continuation, force
from surgery.runtimes.generate import Generation, generate
from surgery.runtimes.graph import PRESENT
from surgery.runtimes.interface import PART, Arrays, Cut, ModelRef, Runtime


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Load the one model, run every batch, generation and embedding chunk; JSON facts."""
    runtime = _load(job["model"], job["threads"])
    scratch = Path(job["scratch"])
    output = job["output"] or find_task(runtime.model.task).output
    first, started = job["first"], time.monotonic()
    batches: dict[int, Any] = dict.fromkeys(range(first, first + job["batches"]))

    def batch(number: int) -> None:
        batches[number] = _run_batch(runtime, scratch, number, output)

    runtime.together([partial(batch, number) for number in batches], scratch, first)
    busy = time.monotonic() - started
    # Without its output a model cannot be continued; the batches say so already.
    able = not any(found["problem"] for found in batches.values())
    generations = _generate(runtime, job["generations"], able)
    continuations = _force(runtime, job["continuations"], able)
    problem = _embed(runtime, scratch / "embedding.npy", job)
    return {
        "batches": list(batches.values()),
        "generations": generations,
        "continuations": continuations,
        "embedding_problem": problem,
        "compute": runtime.compute,
        "busy": busy,
    }


def _load(fields: dict[str, Any], threads: int) -> Runtime:
    folder = fields["initializers"]
    given = fields["given"]
    own = {
        "path": Path(fields["path"]),
        "initializers": Path(folder) if folder else None,
        "cuts": tuple(Cut(**cut) for cut in fields["cuts"]),
        "given": Path(given) if given else None,
    }
    model = ModelRef(**{**fields, **own})
    return RUNTIMES[model.runtime](model, threads)


def _run_batch(runtime: Runtime, scratch: Path, number: int, output: str) -> dict[str, Any]:
    with np.load(scratch / batch_file(number), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    selected, mask = arrays.pop("selected"), arrays["attention_mask"]
    outputs = runtime.infer(arrays, int(arrays.pop("split")))
    task = find_task(runtime.model.task)
    problem = _problem(outputs, output, mask.shape, task.rows)
    if problem is None:
        row, column = selected.T
        kept = {
            name: outputs[source][row] if task.rows else outputs[source][row, column]
            for name, source in ((KEPT, output), (PART, PART))
            if source in outputs
        }
        if task.cache:
            kept |= {name: outputs[name][row, :, column] for name in _caches(outputs, mask.shape)}
        if task.pooled in outputs and outputs[task.pooled].shape[:1] == mask.shape[:1]:
            kept[task.pooled] = outputs[task.pooled][row]
        wide = np.float64 if runtime.model.dtype == "float64" else np.float32
        flat = {name: array.reshape(len(row), -1) for name, array in kept.items()}
        wider = {name: array.astype(wide, copy=False) for name, array in flat.items()}
        np.savez(scratch / kept_file(number), **wider)
    facts = [
        {
            "name": name,
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "nonfinite": count_nonfinite(array, mask),
            "padded": count_nonfinite(array, padding(mask)),
        }
        for name, array in outputs.items()
        if name != PART
    ]
    return {"outputs": facts, "problem": problem}


def _problem(outputs: Arrays, wanted: str, shape: tuple[int, ...], rows: bool) -> str | None:
    """What keeps the output from being kept: `rows` of them, or one for each position."""
    if wanted not in outputs:
        return f"expected output {wanted}; found {', '.join(map(ascii, outputs)) or 'none'}"
    found, expected = outputs[wanted].shape, shape[:1] if rows else shape
    if len(found) != len(expected) + 1 or found[:-1] != expected:
        return f"expected output {wanted} of shape {[*expected, 'n']}; found {list(found)}"
    return None


def _caches(outputs: Arrays, shape: tuple[int, ...]) -> list[str]:
    """The outputs that hold a cache of all positions, [batch, heads, length, size]."""
    return [
        name
        for name, array in outputs.items()
        if name.startswith(PRESENT)
        and array.ndim == 4
        and (*array.shape[:1], array.shape[2]) == shape
    ]


def count_nonfinite(array: NDArray[Any], mask: NDArray[np.int64]) -> int:
    """NaN and infinite values at positions with mask 1.

    The end of axis 2 is the length in a cache [batch, heads, length, size], else axis 1 in
    [batch, length, …]; of [batch, size] rows with such a position count, of others every element.
    """
    if array.dtype.kind not in "fc":
        return 0
    real = mask.astype(bool)
    bad = ~np.isfinite(array)
    if array.ndim == 4 and array.shape[0] == len(mask) and array.shape[2] >= mask.shape[1]:
        bad = bad[:, :, array.shape[2] - mask.shape[1] :].swapaxes(1, 2)[real]
    elif array.shape[:2] == mask.shape:
        bad = bad[real]
    elif array.ndim == 2 and len(array) == len(mask):
        bad = bad[real.any(axis=1)]
    return int(bad.sum())


def padding(mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """1 where a row that has real positions is padded.

    A row of nothing else is left out: its tokens may attend to none, and no two runtimes need
    agree about the mean of nothing. Fused kernels give 0, a mask of minus infinity NaN.
    """
    return np.asarray((1 - mask) * mask.any(axis=1, keepdims=True), np.int64)


def _generate(runtime: Runtime, requests: list[dict[str, Any]], able: bool) -> list[dict[str, Any]]:
    wanted = [
        Generation(tuple(map(tuple, own["prompts"])), own["max_new_tokens"], tuple(own["eos"]))
        for own in requests
    ]
    if not able:
        nothing = [[() for _ in own.prompts] for own in wanted]
        return [{"tokens": rows, "nonfinite": 0, "runners": rows} for rows in nothing]
    return [vars(found) for found in generate(runtime, wanted)]


def _force(runtime: Runtime, requests: list[dict[str, Any]], able: bool) -> list[tuple[float, ...]]:
    wanted = [Continuation(tuple(own["prompt"]), tuple(own["following"])) for own in requests]
    return force(runtime, wanted) if able else [() for _ in wanted]


def _embed(runtime: Runtime, path: Path, job: dict[str, Any]) -> str | None:
    """Writes rows [V, d] chunk by chunk; a graph without a lookup is a problem to report."""
    total, chunk, rows = job["embedding_rows"], job["embedding_chunk"], None
    if total == 0:
        return "no embedding rows were asked for"
    for begin in range(0, total, chunk):
        ids = np.arange(begin, min(begin + chunk, total), dtype=np.int64)
        try:
            part = runtime.embedding(ids)
        except OnnxError as error:
            return str(error)
        if rows is None:
            shape = (total, part.shape[1])
            rows = np.lib.format.open_memmap(path, "w+", dtype=part.dtype, shape=shape)
        rows[begin : begin + len(ids)] = part
    return None


if __name__ == "__main__":
    sys.exit(process.serve(sys.argv[1], work))
