"""Where the two runtimes first part: which module brings an error in, and which only pass it on.

Every value at the edge of a module is compared with PyTorch's. Then the graph is run once more with
PyTorch's own values at every one of those edges: what still differs right after an edge was brought
in between, whatever came before it. Putting PyTorch's values in there alone must make the error
vanish everywhere else: that confirms it. Who else gets it right from the same values (`referees`)
names the stage; `edit` says where an edit goes another way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.differential import Limits, Pair
from surgery.export import onnxfile
from surgery.export.lineage import Lineage
from surgery.export.tasks import Task
from surgery.localize.result import LIMIT, Fault, Localization, Row
from surgery.localize.runs import Runs
from surgery.localize.search import Search
from surgery.localize.trial import Operator
from surgery.stimuli import Batch

__all__ = ["LIMIT", "Fault", "Localization", "Operator", "Row", "localize"]


def localize(
    pair: Pair,
    task: Task,
    batch: Batch,
    lineage: Lineage,
    limits: Limits | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Localization:
    """Where ONNX Runtime parts from PyTorch on one batch.

    `lineage` says which initializer of the graph is which tensor, whether it holds its numbers or
    not. Raises `OnnxError` for a file that is refused, `EnvironmentFault` where a run fails, and
    `NothingCompared` where PyTorch's own numbers are not finite.
    """
    arch = identify(Checkpoint.open(pair.model))
    model = onnxfile.read(pair.onnx, pair.initializers)
    with tempfile.TemporaryDirectory(prefix="surgery-localize-") as scratch:
        runs = Runs(pair, task, batch, Path(scratch), limits or Limits())
        return Search(runs, arch, model, lineage, progress).run()
