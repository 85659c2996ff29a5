"""Small random models of every supported family, as checkpoint folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

FAMILIES = ("gpt2", "llama", "qwen3", "bert")
"""Those that tests of the whole way to ONNX run on."""
DECODERS = ("gpt2", "llama", "qwen3")

_SIZES = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_PLAIN: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GATED: dict[str, Any] = {**_PLAIN, "num_key_value_heads": 2}
_WIDE: dict[str, Any] = {**_GATED, "head_dim": 16}
_GPT: dict[str, Any] = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64}
_FALCON: dict[str, Any] = {
    **{key: value for key, value in _PLAIN.items() if key != "intermediate_size"},
    "ffn_hidden_size": 48,
}
_NEW_FALCON: dict[str, Any] = {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 3}
_OPT: dict[str, Any] = {
    **{key: value for key, value in _PLAIN.items() if key != "intermediate_size"},
    "ffn_dim": 48,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", _GPT),
    "gptj": ("GPTJForCausalLM", {**_GPT, "n_inner": 48, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXForCausalLM", _PLAIN),
    "gpt_neox-sequential": (
        "GPTNeoXForCausalLM",
        {**_PLAIN, "use_parallel_residual": False, "attention_bias": False},
    ),
    "bloom": ("BloomForCausalLM", {"n_layer": 2, "hidden_size": 32, "n_head": 4, "seq_length": 64}),
    "falcon": ("FalconForCausalLM", _FALCON),
    "falcon-biased": ("FalconForCausalLM", {**_FALCON, "bias": True}),
    "falcon-new": ("FalconForCausalLM", _NEW_FALCON),
    "falcon-one-norm": ("FalconForCausalLM", {**_NEW_FALCON, "num_ln_in_parallel_attn": 1}),
    "falcon-rw": (
        "FalconForCausalLM",
        {**_FALCON, "multi_query": False, "alibi": True, "bias": True, "parallel_attn": False},
    ),
    "mpt": ("MptForCausalLM", {"n_layers": 2, "d_model": 32, "n_heads": 4, "max_seq_len": 64}),
    "opt": ("OPTForCausalLM", _OPT),
    "opt-unbiased": (
        "OPTForCausalLM",
        {**_OPT, "enable_bias": False, "_remove_final_layer_norm": True},
    ),
    "llama": ("LlamaForCausalLM", _GATED),
    "llama-biased": (
        "LlamaForCausalLM",
        {**_WIDE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralForCausalLM", _WIDE),
    "qwen2": ("Qwen2ForCausalLM", {**_GATED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**_WIDE, "tie_word_embeddings": True}),
    "gemma": ("GemmaForCausalLM", _WIDE),
    "gemma-biased": ("GemmaForCausalLM", {**_WIDE, "attention_bias": True}),
    "gemma2": ("Gemma2ForCausalLM", _WIDE),
    "gemma3_text": ("Gemma3ForCausalLM", _WIDE),
    "phi3": ("Phi3ForCausalLM", _GATED),
    "phi3-partial": ("Phi3ForCausalLM", {**_GATED, "partial_rotary_factor": 0.5}),
    "mixtral": ("MixtralForCausalLM", {**_GATED, **_EXPERTS}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**_WIDE, **_EXPERTS, "moe_intermediate_size": 40, "mlp_only_layers": [0]},
    ),
    "bert": ("BertForMaskedLM", _PLAIN),
    "roberta": ("RobertaForMaskedLM", {**_PLAIN, "type_vocab_size": 1}),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"n_layers": 2, "dim": 32, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    ),
}
"""Every family, and after a dash every variant that its facts describe: class and config."""


def family_of(model: str) -> str:
    """The family of an entry of `MODELS`."""
    return model.partition("-")[0]


def config_class(model: str) -> Any:
    """The transformers config class of an entry of `MODELS`."""
    import transformers

    return getattr(transformers, MODELS[model][0]).config_class


def make(model: str, path: Path, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Path:
    """Saves a random two-layer model, an entry of `MODELS`, to `path` with `save_pretrained`.

    Biases and norm weights are random too: zeros and ones would hide a wrong tensor. Encoders are
    saved with their masked-LM head, so that tensors carry the base model's prefix.
    """
    import torch
    import transformers

    cls, fields = MODELS[model]
    config = config_class(model)(**{**_SIZES, **fields, **overrides})
    torch.manual_seed(seed)
    made = getattr(transformers, cls)(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.to(getattr(torch, dtype)).save_pretrained(path)
    return path


def config_of(path: Path) -> dict[str, Any]:
    """The parsed `config.json` of a saved model."""
    return dict(json.loads((path / "config.json").read_text()))


LAYERS = {"gpt2": "n_layer", "gptj": "n_layer", "bloom": "n_layer", "mpt": "n_layers",
          "distilbert": "n_layers"}  # fmt: skip
"""The config field for the number of layers, of families that do not say num_hidden_layers."""


def deep(model: str, layers: int) -> dict[str, int]:
    """What makes a random model that many layers deep."""
    return {LAYERS.get(family_of(model), "num_hidden_layers"): layers}


class Zoo:
    """Models and their exports, each made once, when a test first asks for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[str, Path] = {}

    def checkpoint(self, model: str, dtype: str = "float32", **overrides: Any) -> Path:
        """A random model; of the same `overrides` the same one."""
        name = "-".join([model, dtype, *(f"{key}={overrides[key]}" for key in sorted(overrides))])
        if name not in self._made:
            self._made[name] = make(model, self.root / name, dtype=dtype, **overrides)
        return self._made[name]

    def onnx(
        self,
        family: str,
        task: str,
        dtype: str = "float32",
        stored: str = "float32",
        layout: str = "portable",
        **overrides: Any,
    ) -> Path:
        """The `model.onnx` of an export in this process, in `dtype`, of weights in `stored`.

        A linked one lies in a copy of the checkpoint.
        """
        from here import in_this_process

        from surgery.export import export

        source = self.checkpoint(family, stored, **overrides)
        folder = self.root / f"{source.name}-{layout}-{task}-{dtype}"
        if folder.name not in self._made:
            if layout == "linked":
                source = Path(shutil.copytree(source, folder))
            with in_this_process():
                made = export(source, folder, task=task, dtype=dtype, layout=layout)
            self._made[folder.name] = made.model
        return self._made[folder.name]


_ZOOS: list[Zoo] = []


def shared_zoo(root: Path) -> Zoo:
    """The one zoo of a test session, rooted where it was first asked for."""
    if not _ZOOS:
        _ZOOS.append(Zoo(root))
    return _ZOOS[0]
