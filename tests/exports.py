"""What of which family's export is proven, and what had to be gone round, as data.

The tests of exports run over these lists, and `docs/coverage.md` repeats them.
"""

from __future__ import annotations

from typing import Any

from models import MODELS, family_of

FAMILIES = tuple(model for model in MODELS if model == family_of(model))
VARIANTS = tuple(model for model in MODELS if model not in FAMILIES)
ENCODERS = ("bert", "roberta", "distilbert")
CAUSAL = tuple(model for model in MODELS if family_of(model) not in ENCODERS)
DECODERS = tuple(family for family in FAMILIES if family not in ENCODERS)
EXPERTS = ("mixtral", "qwen3_moe")

WINDOW = 8
_SOME: dict[str, Any] = {
    "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1,
}  # fmt: skip
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "qwen2": _SOME,
    "qwen3": _SOME,
    "gemma2": {"sliding_window": WINDOW},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 2},
    "phi3": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW},
    "qwen3_moe": _SOME,
}
"""Configs with a window that attention does not look past."""

LINKED, PORTABLE = "linked", "portable"
WITH_CACHE, FLOAT16, STITCHED = "with a cache", "float16", "stitched"
PROVED: dict[str, tuple[str, ...]] = {
    LINKED: FAMILIES,
    PORTABLE: FAMILIES,
    WITH_CACHE: DECODERS,
    FLOAT16: FAMILIES,
    STITCHED: FAMILIES,
}
"""The families that the tests prove each on."""

NO_CACHE = "is an encoder, which has no cache"
ROUND: dict[tuple[str, str], str] = {
    **dict.fromkeys(
        ((LINKED, "gemma2"), (PORTABLE, "gemma2")),
        (
            "caps its attention scores, which sdpa does not: eager attention is traced "
            "(huggingface/transformers#31887)"
        ),
    ),
    **{
        (column, family): (
            "multiplies experts in groups, for which there was no ONNX operator "
            "(microsoft/onnxscript#2795): all are traced as one batched product "
            "(huggingface/transformers#42697)"
        )
        for family in EXPERTS
        for column in (LINKED, PORTABLE)
    },
    **{
        (WITH_CACHE, family): (
            "can have a sliding window, which traced caches lost "
            "(huggingface/transformers#47900): here they keep every position, and the mask hides "
            "what lies outside the window"
        )
        for family in WINDOWED
    },
}
"""What is proven, but not the way the family's own code goes."""


def verdict(column: str, family: str) -> tuple[str, str]:
    """`proven` or `refused`, and why, or what was gone round."""
    if family not in PROVED[column]:
        return "refused", NO_CACHE
    return "proven", ROUND.get((column, family), "")
