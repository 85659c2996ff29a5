"""Files that edits read, made for one model: patches, factors, adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from models import config_of, make
from safetensors.numpy import save_file

from surgery.arch import identify
from surgery.checkpoint import Checkpoint

SQUARE = {
    "gpt2": "transformer.h.{}.attn.c_proj.weight",
    "llama": "model.layers.{}.self_attn.o_proj.weight",
    "qwen3": "model.layers.{}.self_attn.o_proj.weight",
    "bert": "bert.encoder.layer.{}.attention.output.dense.weight",
}
"""The output projection of a layer."""
UP = {
    "gpt2": "transformer.h.{}.mlp.c_fc.weight",
    "llama": "model.layers.{}.mlp.up_proj.weight",
    "qwen3": "model.layers.{}.mlp.up_proj.weight",
    "bert": "bert.encoder.layer.{}.intermediate.dense.weight",
}
NORM = {
    "gpt2": "transformer.h.{}.ln_1.weight",
    "llama": "model.layers.{}.input_layernorm.weight",
    "qwen3": "model.layers.{}.self_attn.q_norm.weight",
    "bert": "bert.encoder.layer.{}.output.LayerNorm.bias",
}
EMBED = {
    "gpt2": "transformer.wte.weight",
    "llama": "model.embed_tokens.weight",
    "qwen3": "model.embed_tokens.weight",
    "bert": "bert.embeddings.word_embeddings.weight",
}


def family_of(base: Path) -> str:
    return str(config_of(base)["model_type"])


def random(*shape: int, seed: int = 0, size: float = 0.3) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng((seed, *shape))
    return (size * rng.normal(size=shape)).astype(np.float32)


def shape_of(base: Path, tensor: str) -> tuple[int, ...]:
    return Checkpoint.open(base).info(tensor).shape


def orientation(base: Path, tensor: str) -> tuple[int, int]:
    """(outputs, inputs) of a matrix: gpt2's Conv1D and every embedding store them the other way."""
    shape = shape_of(base, tensor)
    flipped = family_of(base) == "gpt2" or tensor == EMBED[family_of(base)]
    return (shape[1], shape[0]) if flipped else (shape[0], shape[1])


def write_patch(folder: Path, base: Path) -> None:
    """New numbers for a whole matrix and a norm."""
    family = family_of(base)
    names = [SQUARE[family].format(0), NORM[family].format(1)]
    save_file({n: random(*shape_of(base, n)) for n in names}, folder / "patch.safetensors")


def write_box(folder: Path, base: Path) -> None:
    """New numbers for a box of 9 by 4."""
    name = SQUARE[family_of(base)].format(1)
    save_file({name: random(9, 4)}, folder / "box.safetensors")


def write_factors(folder: Path, base: Path) -> None:
    """Products of rank 2, 1 and 3 for a projection, an MLP matrix and the embedding."""
    family, factors = family_of(base), {}
    for rank, name in ((2, SQUARE[family]), (1, UP[family]), (3, EMBED[family])):
        name = name.format(1)
        outputs, inputs = orientation(base, name)
        factors[f"{name}.u"] = random(outputs, rank, seed=1)
        factors[f"{name}.v"] = random(inputs, rank, seed=2)
    name = UP[family].format(1)
    for side in "uv":
        factors[f"{name}.{side}"] = factors[f"{name}.{side}"][:, 0].copy()
    save_file(factors, folder / "uv.safetensors")


def write_vector(folder: Path, base: Path) -> None:
    """A direction of the residual stream, not of norm 1."""
    save_file({"d": random(32, size=3.0)}, folder / "d.safetensors")


def write_means(folder: Path, base: Path) -> None:
    """Mean activations of every head and every neuron, and zeros in their place."""
    sizes = identify(Checkpoint.open(base)).sizes
    heads = (sizes["layers"], sizes["heads"], sizes["head_dim"])
    neurons = (sizes["layers"], sizes["mlp_width"])
    means = {"mean": random(*heads, size=2.0), "neurons": random(*neurons, size=2.0)}
    zeros = {f"{name}.zero": np.zeros_like(values) for name, values in means.items()}
    save_file({**means, **zeros}, folder / "means.safetensors")


def write_auroc(folder: Path, base: Path) -> None:
    """Areas under the ROC curve: experts in a row and apart, one of them perfect, and others."""
    arch = identify(Checkpoint.open(base))
    scores = {0: 0.4, 3: 0.9, 4: 0.75, 5: 1.0, 17: 0.5, 39: 0.6}
    places = [(0, 0), (1, 0), (1, 2)] if arch.sparse else [(0, 0), (1, 0)]
    rows = [
        f"{layer},{expert},{n},{auroc}" for layer, expert in places for n, auroc in scores.items()
    ]
    text = "\n".join(["layer,expert,neuron,auroc", *rows])
    if not arch.sparse:
        text = text.replace(",expert,", ",").replace(",0,", ",")
    (folder / "auroc.csv").write_text(text)


def write_partners(folder: Path, base: Path) -> None:
    """Two more random models like `base`, in the folders `other` and `third`."""
    dtype = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
    stored = next(iter(Checkpoint.open(base).tensors.values())).dtype
    for seed, name in ((1, "other"), (2, "third")):
        make(family_of(base), folder / name, seed, dtype[stored])


def write_adapter(folder: Path, base: Path, **config: Any) -> None:
    """A PEFT adapter of rank 4 (8 in the MLP of layer 0) for three kinds of modules."""
    family, tensors = family_of(base), {}
    modules = [name.format(layer) for layer in (0, 1) for name in (SQUARE[family], UP[family])]
    for module in [*modules, EMBED[family]]:
        outputs, inputs = orientation(base, module)
        rank = 8 if module == UP[family].format(0) else 4
        path = f"base_model.model.{module.removesuffix('.weight')}"
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if module == EMBED[family]
            else ("lora_A.weight", "lora_B.weight")
        )
        tensors[f"{path}.{a}"] = random(rank, inputs, seed=3)
        tensors[f"{path}.{b}"] = random(outputs, rank, seed=4)
    fields = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": [name.removesuffix(".weight") for name in [*modules, EMBED[family]]],
        "rank_pattern": {UP[family].format(0).removesuffix(".weight"): 8},
        "alpha_pattern": {SQUARE[family].format(1).removesuffix(".weight"): 2.0},
        "fan_in_fan_out": family == "gpt2",
        "task_type": None,
    }
    save_adapter(folder / "adapter", tensors, {**fields, **config})


def save_adapter(
    folder: Path, tensors: dict[str, np.ndarray[Any, Any]], config: dict[str, Any]
) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
