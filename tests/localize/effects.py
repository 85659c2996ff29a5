"""How far a mutant is from the clean graph, on the oracle's own inputs and on others beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.export import onnxfile
from surgery.export.tasks import Task
from surgery.runtimes import graph
from surgery.runtimes.session import open_session
from surgery.stimuli import Batch
from surgery.stimuli.batches import cache_batches, pad, probe_batches

Outputs = dict[tuple[str, str], NDArray[Any]]
"""By batch and output, real positions alone."""

_SEED = 1001


def unseen(vocab: int, positions: int, task: Task) -> Iterator[Batch]:
    """Inputs that the oracle has not: other tokens in its shapes, and every token once, in rows
    as long as the model allows."""
    batches = [*probe_batches(vocab, positions, _SEED)]
    if task.cache:
        batches += cache_batches(vocab, positions, _SEED)
    for batch in batches:
        yield _named(f"unseen/{batch.name}", batch)
    order = np.random.default_rng(_SEED).permutation(vocab).tolist()
    rows = [tuple(order[at : at + positions]) for at in range(0, vocab, positions)]
    yield pad("unseen/every token", "unseen", rows, "left", tuple(map(str, range(len(rows)))))


def _named(name: str, batch: Batch) -> Batch:
    return Batch(**{**vars(batch), "name": name})


def outputs(path: Path, task: Task, batches: Sequence[Batch]) -> Outputs:
    """ONNX Runtime's outputs; nothing where the file is refused or a run fails."""
    try:
        model = onnxfile.read(path)
        signature = graph.signature(model, task.output, str(path))
        session = open_session(str(path), None, 1)
        return dict(_run(session, signature, batches))
    except Exception:  # onnxruntime's errors have no base of their own
        return {}


def _run(
    session: Any, signature: graph.Signature, batches: Sequence[Batch]
) -> Iterator[tuple[tuple[str, str], NDArray[Any]]]:
    names = [value.name for value in session.get_outputs()]

    def run(fed: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return dict(zip(names, session.run(None, fed), strict=True))

    for batch in batches:
        real = batch.attention_mask.astype(bool)
        found = graph.infer(signature, run, batch.inputs(), batch.split)
        for name, array in found.items():
            rows = array.swapaxes(1, 2) if name.startswith(graph.PRESENT) else array
            yield (batch.name, name), rows[real] if rows.shape[:2] == real.shape else rows


def effect(clean: Outputs, mutant: Outputs, noise: Mapping[str, float]) -> float:
    """The largest difference in units of each output's noise; infinite where a run fails, an
    output is missing or of another shape, or a number is none."""
    worst = 0.0
    for key, expected in clean.items():
        found = mutant.get(key)
        if found is None or found.shape != expected.shape:
            return float("inf")
        difference = np.abs(found.astype(np.float64) - expected).max(initial=0.0)
        ratio = float(difference) / noise[key[1] if key[1] in noise else ""]
        worst = max(worst, float("inf") if np.isnan(ratio) else ratio)
    return worst
