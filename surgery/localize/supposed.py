"""Whether an edited model's graph is that of half the edit, or of the edit made twice.

Where an edit's effect is far from linear, the interaction's direction does not say so, and where
lineage knows no weight, it cannot. So the graph is held to the models that would be right for it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import numpy_dtype
from surgery.differential import Limits, Pair, Workload, measure
from surgery.evidence import Finding
from surgery.export.tasks import Task
from surgery.gate import RHO_NAMES
from surgery.localize.result import LIMIT
from surgery.process import one_line

Array = NDArray[np.float64]


def _half(old: Array, new: Array) -> Array:
    return old + (new - old) / 2


def _twice(old: Array, new: Array) -> Array:
    return new + (new - old)


def _again(old: Array, new: Array) -> Array:
    """Scaled once more, where an edit scales."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(old == 0, new, new * (new / old))


_SUPPOSED = ((-0.5, _half), (1.0, _twice), (1.0, _again))
"""What may have become of an edit, as its rho, and the weights that the graph then has."""


def became_of_edit(
    pairs: Mapping[str, Pair],
    task: Task,
    workload: Workload,
    findings: Sequence[Finding],
    limits: Limits,
    progress: Callable[[str], None],
) -> list[Finding]:
    """What became of the edit in a wrong graph of the edited model, where none of `findings` says
    it; whatever a search meets is a finding too. Writes models to a folder for the time being."""
    told = [f"{finding.symptom} {finding.message}" for finding in findings]
    wrong = {finding.stage for finding in findings} >= {"conversion", "interaction"}
    if not wrong or any(name in text for name in RHO_NAMES.values() for text in told):
        return []
    asked = workload.batches_only(workload.batches)
    try:
        return list(_supposed(pairs["C_o"], pairs["C_e"], task, asked, limits, progress))
    except Exception as error:  # whatever a search meets, what was measured stays
        text = f"R_e: what became of the edit was not found: {one_line(str(error))}"
        return [Finding("localize", "not found", "R_e", text)]


def _supposed(
    original: Pair,
    edited: Pair,
    task: Task,
    workload: Workload,
    limits: Limits,
    progress: Callable[[str], None],
) -> Iterator[Finding]:
    """Named as the interaction would be, if the edited graph is right for such a model."""
    for rho, weights in _SUPPOSED:
        with tempfile.TemporaryDirectory(prefix="surgery-edit-") as folder:
            model = Path(folder)
            progress(f"PyTorch with the edit {RHO_NAMES[rho]}")
            write_edit(original.model, edited.model, weights, model)
            pair = Pair(model, edited.onnx, edited.data)
            rows = measure({"C_o": pair}, task, workload, limits, progress).conversion
        if rows and all(max(r.ratio_max, r.ratio_l2, r.ratio_position) <= LIMIT for r in rows):
            text = f"R_e: {RHO_NAMES[rho]}: the graph is right for a model with such weights"
            yield Finding("interaction", RHO_NAMES[rho], "R_e", text)
            return


def write_edit(
    original: Path, edited: Path, weights: Callable[[Array, Array], Array], folder: Path
) -> None:
    """The edited checkpoint in `folder`, with `weights` of the original's and the edited numbers in
    every tensor of one shape and dtype in both."""
    before, after = Checkpoint.open(original), Checkpoint.open(edited)
    for file in (*edited.glob("*.json"), *(after.path(name) for name in after.weight_files)):
        shutil.copyfile(file, folder / file.name)
    for name, info in after.tensors.items():
        alike = name in before.tensors and before.info(name).shape == info.shape
        if alike and before.info(name).dtype == info.dtype:
            old, new = (model.read(name).astype(np.float64) for model in (before, after))
            if not np.array_equal(old, new):
                values = weights(old, new).astype(numpy_dtype(info.dtype))
                with (folder / info.file).open("r+b") as shard:
                    shard.seek(info.begin)
                    shard.write(values.tobytes())
