"""Why a tensor of the checkpoint is in no initializer, and whether it should be."""

from __future__ import annotations

from surgery.arch.interface import Architecture
from surgery.checkpoint import Checkpoint

NOT_HELD = "no initializer holds it"


def reason(
    name: str, checkpoint: Checkpoint, arch: Architecture | None, outputs: tuple[str, ...]
) -> str | None:
    """Why tensor `name` may be missing from a graph with these outputs; None if it may not."""
    if arch is None:
        return None
    role = arch.roles.get(name)
    if role is None:
        return f"a buffer that {arch.family} computes itself"
    if arch.tied and role.role == arch.facts.tie.head and role.kind == "weight":
        return f"tied to {arch.name(arch.facts.tie.embed)}"
    module = arch.facts.modules[role.role]
    if arch.facts.kind == "encoder":
        return "a head that the task does not need" if module.optional else None
    if module.root and "logits" not in outputs:
        return "the output head, which the graph has no output for"
    return None
