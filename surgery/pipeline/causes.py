"""Why a conversion or an interaction failed: where the runtimes part, and what the edit became."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from surgery.evidence import EDGES, Evidence
from surgery.export.lineage import Lineage, trace
from surgery.localize import LIMIT, Localization
from surgery.localize import localize as find
from surgery.localize.edit import EditTrace, trace_edit
from surgery.pipeline.pairs import Comparison
from surgery.process import one_line
from surgery.stimuli import Batch

Lineages = Mapping[str, Lineage]


def lineages_of(run: Comparison) -> dict[str, Lineage]:
    """What every initializer of each edge's graph is."""
    return {
        edge: trace(pair.onnx, pair.model, initializers=pair.initializers)
        for edge, pair in run.pairs.items()
    }


def localized(run: Comparison, lineages: Lineages, evidence: Evidence) -> dict[str, Localization]:
    """Each edge of which anything was compared, on the batch that is furthest off."""
    found = {}
    for edge, pair in run.pairs.items():
        rows = [row for row in evidence.conversion if row.edge == edge]
        if rows:
            worst = max(rows, key=lambda row: row.ratio_l2).worst.rpartition(" @ ")[0]
            batch = next(b for b in run.asked.workload.batches if worst in b.rows)

            def report(stage: str, edge: str = edge) -> None:
                run.progress(f"localising {EDGES[edge][1]}: {stage}")

            try:
                own = find(pair, run.asked.task, batch, lineages[edge], run.limits, report)
            except Exception as error:  # whatever a search meets, what was measured stays
                name, text = type(error).__name__, one_line(str(error))
                own = Localization((), (), batch.name, note=f"{name}: {text}")
            wrong = any(max(row.ratio_l2, row.ratio_max) > LIMIT for row in rows)
            found[edge] = replace(own, note=_unseen(batch)) if own.clean and wrong else own
    return found


def traced(run: Comparison, lineages: Lineages, evidence: Evidence) -> EditTrace:
    """What becomes of the edit in each module, on the batch whose interaction is the largest."""
    if not evidence.stimuli:
        return EditTrace((), "", "the interaction was not measured on any stimulus")
    worst = max(evidence.stimuli, key=lambda row: row.noise_ratio).stimulus
    batch = next(b for b in run.asked.workload.batches if worst in b.rows)

    def report(stage: str) -> None:
        run.progress(f"tracing the edit: {stage}")

    with tempfile.TemporaryDirectory(prefix="surgery-edit-") as scratch:
        try:
            folder, task = Path(scratch), run.asked.task
            return trace_edit(run.pairs, task, batch, lineages, folder, run.limits, report)
        except Exception as error:  # whatever a search meets, what was measured stays
            return EditTrace((), batch.name, f"{type(error).__name__}: {one_line(str(error))}")


def _unseen(batch: Batch) -> str:
    """Why every boundary may be right though the output was not."""
    if batch.split:
        return (
            "every boundary is right where all positions run at once; the output was wrong over "
            "a key-value cache, so look at what goes in and out of the caches"
        )
    return (
        "every boundary is right where its value is also an output of the graph, which keeps "
        "ONNX Runtime from fusing across it; so look at its fusions"
    )
