"""Weights that are not the checkpoint's: lineage names them without a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from surgery.differential import Pair
from surgery.evidence import EDGES, Finding
from surgery.export.lineage import Lineage
from surgery.export.lineage.diagnosis import MISSING
from surgery.gate import name_rho
from surgery.localize.edits import EditShares


def stale_tensors(lineages: Mapping[str, Lineage], pairs: Mapping[str, Pair]) -> Iterator[Finding]:
    """Initializers that should be a checkpoint tensor and are not, by edge; in an edited model's
    graph with what became of the edit there.

    Tensors that no initializer holds are left to the outputs: an exporter may have made something
    else of them that computes the same.
    """
    for edge, lineage in lineages.items():
        corner, shares = EDGES[edge][1], _shares(edge, lineage, pairs)
        for fault in lineage.findings:
            if fault.symptom != MISSING:
                model = Path(lineage.model).name
                edit = _told(shares, fault.initializer)
                message = f"{corner}: {fault.message}{edit}; export {model} again"
                yield Finding("lineage", fault.symptom, f"{corner}/{fault.tensor}", message)


def _shares(edge: str, lineage: Lineage, pairs: Mapping[str, Pair]) -> EditShares | None:
    edited = edge == "C_e" and "C_o" in pairs
    return EditShares(pairs["C_o"], pairs["C_e"], lineage) if edited else None


def _told(shares: EditShares | None, initializer: str | None) -> str:
    """What became of the edit in one initializer, in the words that the interaction has for it."""
    share = shares.share(initializer) if shares is not None and initializer else None
    if share is None:
        return ""
    name = name_rho(share - 1)
    return f": {name}" if name else f": it has {share:.3g} times the edit"
