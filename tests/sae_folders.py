"""Autoencoders in every format's own layout, of one set of numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from recipes import HEADS

from surgery.recipe import RecipeFolder, parse_recipe

D, N = 32, 12
HOOK = "blocks.1.hook_resid_post"
Arrays = dict[str, np.ndarray[Any, Any]]


def arrays(seed: int = 0) -> Arrays:
    """The numbers of one autoencoder in the frame's own orientation, float32."""
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,), "threshold": (N,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def save(path: Path, tensors: Arrays) -> None:
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, path)


def save_json(path: Path, fields: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields))


def save_pickle(path: Path, state: dict[str, Any]) -> None:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: torch.tensor(values) for name, values in state.items()}, path)


def saelens(root: Path, a: Arrays) -> str:
    save(root / "sae/sae_weights.safetensors", a)
    fields = {"architecture": "jumprelu", "d_in": D, "d_sae": N, "dtype": "float32"}
    more = {"apply_b_dec_to_input": False, "normalize_activations": "none"}
    save_json(root / "sae/cfg.json", {**fields, **more, "metadata": {"hook_name": HOOK}})
    return "sae"


def sparsify(root: Path, a: Arrays) -> str:
    tensors = {"encoder.weight": a["W_enc"].T, "encoder.bias": a["b_enc"]}
    save(root / "layers.1/sae.safetensors", {**tensors, "W_dec": a["W_dec"], "b_dec": a["b_dec"]})
    fields = {"activation": "topk", "expansion_factor": 32, "num_latents": N, "k": 4, "d_in": D}
    more = {"transcode": False, "skip_connection": False, "normalize_decoder": True}
    save_json(root / "layers.1/cfg.json", {**fields, **more})
    return "layers.1"


def dictionary_learning(root: Path, a: Arrays, kind: str = "AutoEncoderTopK") -> str:
    linear = {
        "encoder.weight": a["W_enc"].T, "encoder.bias": a["b_enc"], "decoder.weight": a["W_dec"].T
    }  # fmt: skip
    topk = {**linear, "b_dec": a["b_dec"], "k": np.int64(4), "threshold": np.float32(0.5)}
    gated = {name: linear[name] for name in ("encoder.weight", "decoder.weight")}
    bias = dict.fromkeys(("r_mag", "gate_bias", "mag_bias"), a["b_enc"])
    states = {
        "AutoEncoder": {**linear, "bias": a["b_dec"]},
        "AutoEncoderNew": {**linear, "decoder.bias": a["b_dec"]},
        "GatedAutoEncoder": {**gated, **bias, "decoder_bias": a["b_dec"]},
        "JumpReluAutoEncoder": a,
        "AutoEncoderTopK": topk,
        "BatchTopKSAE": topk,
        "MatryoshkaBatchTopKSAE": {**a, "threshold": np.float32(0.5), "k": np.int64(4)},
    }
    save_pickle(root / "trainer_0/ae.pt", states[kind])
    trainer = {
        "dict_class": kind,
        "activation_dim": D,
        "dict_size": N,
        "layer": 1,
        "k": 4,
        "lm_name": "x/y",
    }
    fields = {"trainer": {**trainer, "submodule_name": "resid_post_layer_1"}}
    save_json(root / "trainer_0/config.json", {**fields, "buffer": {"io": "out", "ctx_len": 128}})
    return "trainer_0"


def gemma_scope(root: Path, a: Arrays) -> str:
    name = "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_71"
    (root / name).mkdir(parents=True)
    np.savez(root / name / "params.npz", **a)
    return name


def gemma_scope_2(root: Path, a: Arrays) -> str:
    name = "resid_post/layer_1_width_16k_l0_small"
    lower = {"W_enc": "w_enc", "W_dec": "w_dec"}
    save(root / name / "params.safetensors", {lower.get(k, k): v for k, v in a.items()})
    fields = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "l0": 20}
    save_json(root / name / "config.json", {**fields, "hf_hook_point_in": "model.layers.1.output"})
    return name


def llama_scope(root: Path, a: Arrays) -> str:
    name = "Llama3_1-8B-Base-L1R-8x"
    linear = {"encoder.weight": a["W_enc"].T, "encoder.bias": a["b_enc"]}
    decoder = {"decoder.weight": a["W_dec"].T, "decoder.bias": a["b_dec"]}
    save(root / name / "checkpoints/final.safetensors", {**linear, **decoder})
    fields = {"d_model": D, "d_sae": N, "jump_relu_threshold": 0.5, "act_fn": "jumprelu"}
    norm = {"norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 8.0}}
    save_json(root / name / "hyperparams.json", {**fields, **norm, "hook_point_in": HOOK})
    return name


WRITERS: dict[str, Callable[[Path, Arrays], str]] = {
    "saelens": saelens, "sparsify": sparsify, "dictionary_learning": dictionary_learning,
    "gemma_scope": gemma_scope, "gemma_scope_2": gemma_scope_2, "llama_scope": llama_scope,
}  # fmt: skip
SCALE = {"llama_scope": np.sqrt(D) / 8}
CENTERED = ("sparsify", "dictionary_learning")


def files_of(root: Path) -> RecipeFolder:
    return RecipeFolder(parse_recipe(json.dumps({"schema": 1, "edits": [HEADS]}), "recipe", root))
