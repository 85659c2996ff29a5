"""Small random models of every supported family, as checkpoint folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FAMILIES = ("gpt2", "llama", "qwen3", "bert")
DECODERS = ("gpt2", "llama", "qwen3")

_SIZES = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GATED: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64},
    "llama": _GATED,
    "qwen3": {**_GATED, "head_dim": 16, "tie_word_embeddings": True},
    "bert": {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    },
}


def make(family: str, path: Path, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Path:
    """Saves a random two-layer model of `family` to `path` with `save_pretrained`.

    Biases and norm weights are random too: zeros and ones would hide a wrong tensor. `bert` is
    saved with its masked-LM head, so that its tensors carry the base model's prefix.
    """
    import torch
    import transformers

    names = {"gpt2": "GPT2", "llama": "Llama", "qwen3": "Qwen3", "bert": "Bert"}
    head = (
        "ForMaskedLM" if family == "bert" else "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    )
    config = getattr(transformers, f"{names[family]}Config")(
        **{**_SIZES, **_CONFIGS[family], **overrides}
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{names[family]}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return path


def config_of(path: Path) -> dict[str, Any]:
    """The parsed `config.json` of a saved model."""
    return dict(json.loads((path / "config.json").read_text()))


class Zoo:
    """Models and their exports, each made once, when a test first asks for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[str, Path] = {}

    def checkpoint(self, family: str, dtype: str = "float32") -> Path:
        name = f"{family}-{dtype}"
        if name not in self._made:
            self._made[name] = make(family, self.root / name, dtype=dtype)
        return self._made[name]

    def onnx(self, family: str, task: str, dtype: str = "float32", stored: str = "float32") -> Path:
        """The `model.onnx` of an export in this process, in `dtype`, of weights in `stored`."""
        from surgery.export import export

        name = f"{family}-{stored}-{task}-{dtype}"
        if name not in self._made:
            source = self.checkpoint(family, stored)
            self._made[name] = export(source, self.root / name, task=task, dtype=dtype).model
        return self._made[name]


_ZOOS: list[Zoo] = []


def shared_zoo(root: Path) -> Zoo:
    """The one zoo of a test session, rooted where it was first asked for."""
    if not _ZOOS:
        _ZOOS.append(Zoo(root))
    return _ZOOS[0]
