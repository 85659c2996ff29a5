"""Weights that are not the checkpoint's: lineage names them without a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from surgery.evidence import EDGES, Finding
from surgery.export.lineage import Lineage
from surgery.export.lineage.diagnosis import MISSING


def stale_tensors(lineages: Mapping[str, Lineage]) -> Iterator[Finding]:
    """Initializers that should be a checkpoint tensor and are not, by edge.

    Tensors that no initializer holds are left to the outputs: an exporter may have made something
    else of them that computes the same.
    """
    for edge, lineage in lineages.items():
        corner = EDGES[edge][1]
        for fault in lineage.findings:
            if fault.symptom != MISSING:
                model = Path(lineage.model).name
                message = f"{corner}: {fault.message}; export {model} again"
                yield Finding("lineage", fault.symptom, f"{corner}/{fault.tensor}", message)
