"""Files that edits read, made for one model: patches, factors, adapters."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from surgery.arch import Architecture, identify
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


@dataclass(frozen=True)
class Names:
    """Tensors of a model that every family has, by what they do; a matrix's `conv1d` storage."""

    arch: Architecture

    @property
    def embed(self) -> str:
        return self.arch.name("embed")

    def square(self, layer: int) -> str:
        """The output projection of a layer."""
        return self.arch.name("o_proj", layer)

    def up(self, layer: int) -> str:
        """A matrix that enters the MLP, or, where there are experts, the attention."""
        modules = self.arch.facts.modules
        roles = ("up_proj", "gate_up_proj", "q_proj", "qkv_proj")
        return next(
            name
            for name in (self.arch.name(role, layer) for role in roles if role in modules)
            if name in self.arch.roles
        )

    def norm(self, layer: int) -> str:
        """A norm's weight."""
        modules = self.arch.facts.modules
        roles = ("q_norm", "input_norm", "attn_norm", "mlp_norm")
        return next(self.arch.name(role, layer) for role in roles if role in modules)

    @property
    def experts(self) -> list[str]:
        """All matrices of one expert and one of another, in the last layer."""
        roles = [role for role in self.arch.facts.modules if role.startswith("expert_")]
        return [self.arch.name(role, 1, expert=1) for role in roles] + [
            self.arch.name(role, 1, expert=2) for role in roles[:1]
        ]

    def conv1d(self, tensor: str) -> bool:
        return self.arch.facts.modules[self.arch.roles[tensor].role].type == "conv1d"


def names_of(base: Path) -> Names:
    return Names(identify(Checkpoint.open(base)))


def random(*shape: int, seed: int = 0, size: float = 0.3) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng((seed, *shape))
    return (size * rng.normal(size=shape)).astype(np.float32)


def shape_of(base: Path, tensor: str) -> tuple[int, ...]:
    return Checkpoint.open(base).info(tensor).shape


def orientation(base: Path, tensor: str) -> tuple[int, int]:
    """(outputs, inputs) of a matrix: Conv1D and embeddings store them the other way."""
    names, shape = names_of(base), shape_of(base, tensor)
    flipped = names.conv1d(tensor) or tensor == names.embed
    return (shape[1], shape[0]) if flipped else (shape[0], shape[1])


def write_patch(folder: Path, base: Path) -> None:
    """New numbers for a whole matrix, a norm, the embedding and, where there are any, experts."""
    names = names_of(base)
    chosen = [names.square(0), names.norm(1), names.embed, *names.experts]
    save_file({n: random(*shape_of(base, n)) for n in chosen}, folder / "patch.safetensors")


def write_box(folder: Path, base: Path) -> None:
    """New numbers for a box of 9 by 4."""
    save_file({names_of(base).square(1): random(9, 4)}, folder / "box.safetensors")


def write_factors(folder: Path, base: Path) -> None:
    """Products of rank 1 to 3 for a projection, a matrix that reads, the embedding and experts."""
    names, factors = names_of(base), {}
    ranks = {names.square(1): 2, names.up(1): 1, names.embed: 3, **dict.fromkeys(names.experts, 2)}
    for name, rank in ranks.items():
        outputs, inputs = orientation(base, name)
        factors[f"{name}.u"] = random(outputs, rank, seed=1)
        factors[f"{name}.v"] = random(inputs, rank, seed=2)
    for side in "uv":
        factors[f"{names.up(1)}.{side}"] = factors[f"{names.up(1)}.{side}"][:, 0].copy()
    save_file(factors, folder / "uv.safetensors")


def write_vector(folder: Path, base: Path) -> None:
    """A direction of the residual stream, not of norm 1."""
    width = identify(Checkpoint.open(base)).width
    save_file({"d": random(width, size=3.0)}, folder / "d.safetensors")


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
    """Two more models like `base` with other numbers, in the folders `other` and `third`."""
    import torch
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save

    for seed, name in ((1, "other"), (2, "third")):
        shutil.copytree(base, folder / name)
        torch.manual_seed(seed)
        for path in (folder / name).glob("*.safetensors"):
            tensors = {n: t + 0.1 * torch.randn_like(t) for n, t in load_file(path).items()}
            save(tensors, path, {"format": "pt"})


def write_adapter(folder: Path, base: Path, **config: Any) -> None:
    """A PEFT adapter of rank 4 (8 in one module of layer 0) for each kind of modules."""
    names, tensors = names_of(base), {}
    modules = [name for layer in (0, 1) for name in (names.square(layer), names.up(layer))]
    modules += names.experts
    for module in [*modules, names.embed]:
        outputs, inputs = orientation(base, module)
        rank = 8 if module == names.up(0) else 4
        path = f"base_model.model.{module.removesuffix('.weight')}"
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if module == names.embed
            else ("lora_A.weight", "lora_B.weight")
        )
        tensors[f"{path}.{a}"] = random(rank, inputs, seed=3)
        tensors[f"{path}.{b}"] = random(outputs, rank, seed=4)
    fields = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": [name.removesuffix(".weight") for name in [*modules, names.embed]],
        "rank_pattern": {names.up(0).removesuffix(".weight"): 8},
        "alpha_pattern": {names.square(1).removesuffix(".weight"): 2.0},
        "fan_in_fan_out": names.conv1d(names.square(0)),
        "task_type": None,
    }
    save_adapter(folder / "adapter", tensors, {**fields, **config})


def save_adapter(
    folder: Path, tensors: dict[str, np.ndarray[Any, Any]], config: dict[str, Any]
) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
