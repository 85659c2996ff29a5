"""Heads and neurons to leave out of every model, and the families whose config cannot say so."""

from __future__ import annotations

from typing import Any

FREE = (
    "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma-biased", "phi3", "phi3-partial",
    "mixtral",
)  # fmt: skip
DIVISOR = ("llama", "llama-biased", "gemma2", "gemma3_text")
"""Models whose config class wants the number of heads to divide the width; all others take a
head's size from the width and can lose none."""
NO_FIELD = ("bloom", "mpt")
"""Families whose config has no field for the width of the MLP."""


def pruned_heads(*heads: str) -> dict[str, Any]:
    return {"op": "heads", "heads": list(heads), "prune": True}


ONE_OF_EACH = pruned_heads("L0H0", "L0H3", "L1H1", "L1H2")
"""One head of both key-value groups in both layers: two of four are left."""
A_GROUP = pruned_heads("L0H0", "L0H1", "L1H2", "L1H3")
"""A whole key-value group of both layers: two of four are left, with one key-value head."""
THREE = pruned_heads("L0H0", "L0H1", "L0H2", "L1H0", "L1H2", "L1H3")
"""A group and a head of the other: one is left."""


def pruned_neurons(model: str) -> dict[str, Any]:
    """As many neurons of every layer, or of every expert."""
    places = {"mixtral": ["L0E{}", "L1E{}"], "qwen3_moe": ["L1E{}"]}
    chosen = {0: (0, 7, 8), 1: (39, 3, 20), 2: (1, 2, 3)}
    names = [
        f"{place.format(expert)}N{n}"
        for place in places.get(model, ["L0", "L1"])
        for expert in (range(3) if "{" in place else (int(place[1]),))
        for n in chosen[expert]
    ]
    return {"op": "neurons", "neurons": names, "prune": True}
