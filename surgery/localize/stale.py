"""Where a conversion went wrong: today by lineage, which needs no run to name a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from surgery.differential import Pair
from surgery.evidence import EDGES, Finding
from surgery.export.lineage import compare_initializers


def stale_tensors(pairs: Mapping[str, Pair]) -> Iterator[Finding]:
    """Initializers that carry the name and shape of a checkpoint tensor, but not its numbers.

    Raises `OnnxError` and `CheckpointError` for files that cannot be read.
    """
    for edge, pair in pairs.items():
        corner = EDGES[edge][1]
        for row in compare_initializers(pair.onnx, pair.model, pair.initializers):
            if row.status == "different":
                message = (
                    f"{corner}: initializer {row.initializer} is not {row.tensor} of "
                    f"{pair.model.name}; export that checkpoint again"
                )
                yield Finding("lineage", "stale tensor", f"{corner}/{row.tensor}", message)
