"""Models whose neurons can be features of an autoencoder, and an autoencoder for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from recipes import make_sae, sae_edit

KEYS = {
    "activation_function": ("gpt2", "gptj"),
    "activation": (
        "distilbert", "falcon", "falcon-biased", "falcon-new", "falcon-one-norm", "falcon-rw"
    ),
    "hidden_act": ("gpt_neox", "gpt_neox-sequential", "bert", "roberta", "llama", "llama-biased"),
}  # fmt: skip
RELU: dict[str, dict[str, str]] = {"opt": {}, "opt-unbiased": {}}
RELU |= {model: {key: "relu"} for key, models in KEYS.items() for model in models}
"""Models whose MLPs have ReLU, if the config says so, and biases, or a field that turns them on."""
FLAGGED = {"opt-unbiased": "enable_bias", "llama": "mlp_bias", "falcon": "bias",
           "falcon-new": "bias", "falcon-one-norm": "bias"}  # fmt: skip
HOOK = "blocks.1.mlp.input"
EDIT = sae_edit("append_neuron", (1, 4, 7), strength=0.2)
D, N, K = 32, 12, 3


def relu(model: str, base_of: Callable[..., Path], dtype: str = "float32") -> Path:
    return base_of(model, dtype, **RELU[model])


def write_sae(folder: Path, hook: str = HOOK, seed: int = 0, **config: Any) -> dict[str, Any]:
    """One in SAELens format with every tensor there can be, in float64."""
    from safetensors.numpy import save_file

    make_sae(folder, hook, D, **config)
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,)}
    tensors = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "sae_weights.safetensors")
    return tensors
