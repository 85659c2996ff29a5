"""Referees: who else gets a boundary right, and so which stage of the conversion is at fault.

They stand in the order of the conversion. PyTorch is what all are held to; its exported program
is what the capture gave; the onnx package's evaluator says what the graph means; ONNX Runtime
without optimisations is its kernels alone; each level more is its optimiser.
"""

from __future__ import annotations

from surgery.localize.referees.eager import Eager
from surgery.localize.referees.exported import Exported
from surgery.localize.referees.interface import Case, Referee, Ruling
from surgery.localize.referees.panel import Panel, Verdict
from surgery.localize.referees.reference import Reference
from surgery.localize.referees.session import Session

__all__ = ["Case", "Panel", "Referee", "Ruling", "Verdict", "referees"]

LEVELS = ("disabled", "basic", "extended", "all")
"""ONNX Runtime's optimisations, from all off to all on."""


def referees() -> tuple[Referee, ...]:
    """All of them in order, with every execution provider that this machine's build has."""
    from surgery.runtimes.session import other_providers

    levels = [Session(level) for level in LEVELS]
    others = [Session("all", provider) for provider in other_providers()]
    return (Eager(), Exported(), Reference(), *levels, *others)
