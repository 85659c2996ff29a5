"""Runtimes × stimuli × metrics to `Evidence`: the four corners, run and compared."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from surgery.differential.compare import compare
from surgery.differential.corners import Pair, Progress, run_corners
from surgery.differential.rounds import explore, only
from surgery.differential.workload import DEFAULT_SEED, Workload, make_workload
from surgery.evidence import Evidence
from surgery.export.tasks import Task
from surgery.runtimes.child import Limits

__all__ = [
    "DEFAULT_SEED",
    "Limits",
    "Pair",
    "Progress",
    "Workload",
    "explore",
    "make_workload",
    "measure",
    "only",
]


def measure(
    pairs: Mapping[str, Pair],
    task: Task,
    workload: Workload,
    limits: Limits,
    progress: Progress,
) -> Evidence:
    """Runs and compares the corners of `pairs` (`C_o`, and `C_e` for an edited model).

    Raises the `InputError` of a model file that cannot be used; whatever else happens in a
    corner, a crash, a timeout, NaN, is evidence.
    """
    with tempfile.TemporaryDirectory(prefix="surgery-diff-") as scratch:
        ran = run_corners(pairs, task, workload, Path(scratch), limits, progress)
        progress("comparison")
        return compare(ran, workload, task)
