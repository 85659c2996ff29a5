"""What to edit: where a behaviour comes from, with the controls that say it is not chance."""

from __future__ import annotations

from surgery.find.interface import Finder, Goal, Lab, Proposal, Ranking
from surgery.registry import Registry

FINDERS: Registry[type[Finder]] = Registry(
    "kind",
    {
        "heads": "surgery.find.heads:Heads",
        "neurons": "surgery.find.neurons:Neurons",
        "features": "surgery.find.features:Features",
        "components": "surgery.find.components:Components",
        "direction": "surgery.find.direction:Direction",
        "layers": "surgery.find.layers:Layers",
    },
)

__all__ = ["FINDERS", "Finder", "Goal", "Lab", "Proposal", "Ranking"]
