"""Where a conversion went wrong: today by lineage, which needs no run to name a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from surgery.differential import Pair
from surgery.evidence import EDGES, Finding
from surgery.export.lineage import trace
from surgery.export.lineage.diagnosis import MISSING


def stale_tensors(pairs: Mapping[str, Pair]) -> Iterator[Finding]:
    """Initializers that should be a checkpoint tensor and are not.

    Tensors that no initializer holds are left to the outputs: an exporter may have made something
    else of them that computes the same.

    Raises `OnnxError` and `CheckpointError` for files that cannot be read.
    """
    for edge, pair in pairs.items():
        corner = EDGES[edge][1]
        for fault in trace(pair.onnx, pair.model, initializers=pair.initializers).findings:
            if fault.symptom != MISSING:
                message = f"{corner}: {fault.message}; export {pair.model.name} again"
                yield Finding("lineage", fault.symptom, f"{corner}/{fault.tensor}", message)
