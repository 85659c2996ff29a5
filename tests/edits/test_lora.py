"""`lora` merges what PEFT merges, and refuses what is not scale · B·A."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inputs import random, save_adapter, write_adapter
from models import FAMILIES, MODELS
from oracles import load_model, logits, noise
from recipes import apply_edits, plan_of, stored
from safetensors.numpy import load_file, save_file

from surgery.checkpoint import Checkpoint
from surgery.errors import InputError

EDIT = {"op": "lora", "adapter": "adapter"}
TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen3": ["k_proj", "o_proj", "gate_proj"],
    "bert": ["query", "dense"],
}
SPARSE = ("mixtral", "qwen3_moe")
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 10},
    "rank-stabilised": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "r": 4,
        "rank_pattern": {"c_proj": 2, "q_proj": 6, "^model.layers.1.self_attn.o_proj": 8},
        "alpha_pattern": {"v_proj": 3, "query": 1, "gate_proj": 12},
    },
    "one layer": {"r": 4, "layers_to_transform": [1]},
    "biases": {"r": 2, "bias": "lora_only"},
    "all biases": {"r": 2, "bias": "all"},
    "wrong way": {"r": 4, "fan_in_fan_out": True},
}


def train(base: Path, folder: Path, **config: Any) -> np.ndarray[Any, Any]:
    """A PEFT adapter with random numbers in `folder`; the logits of its own merge."""
    import torch
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        # PEFT corrects fan_in_fan_out with a warning where it is wrong for a module.
        warnings.simplefilter("ignore")
        model = get_peft_model(load_model(base), LoraConfig(**config))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        return logits(model.merge_and_unload().eval())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_merge_is_pefts(
    name: str, family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base, config = base_of(family), CONFIGS[name]
    expected = train(base, tmp_path / "adapter", target_modules=TARGETS[family], **config)
    output = apply_edits(tmp_path, base, [EDIT])
    found, before = logits(load_model(output)), logits(load_model(base))
    assert np.abs(expected - before).max() > 1000 * noise(base)
    assert np.abs(found - expected).max() <= 20 * noise(base)


@pytest.mark.parametrize("model", [model for model in MODELS if model not in FAMILIES])
def test_of_every_linear_of_every_family_the_merge_is_pefts(
    model: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Of experts PEFT adapts the stack, which is refused; attention beside them is not."""
    base, target = base_of(model), "all-linear" if model not in SPARSE else ["q_proj", "o_proj"]
    expected = train(base, tmp_path / "adapter", target_modules=target, r=3, lora_alpha=6)
    found = logits(load_model(apply_edits(tmp_path, base, [EDIT])))
    assert np.abs(expected - logits(load_model(base))).max() > 1000 * noise(base)
    assert np.abs(found - expected).max() <= 20 * noise(base)


@pytest.mark.parametrize(
    ("model", "module"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w2"),
        ("qwen3_moe", "model.layers.1.mlp.experts.1.gate_proj"),
    ],
)
def test_an_adapter_of_one_expert_changes_that_expert(
    model: str, module: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base, name = base_of(model), f"{module}.weight"
    outputs, inputs = stored(base, name).shape
    a, b = random(2, inputs, seed=1), random(outputs, 2, seed=2)
    path = f"base_model.model.{module}"
    tensors = {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": [module]}
    save_adapter(tmp_path / "adapter", tensors, config)
    output = apply_edits(tmp_path, base, [EDIT])
    for other in Checkpoint.open(base).tensors:
        change = 1.5 * b.astype(float) @ a if other == name else 0
        assert np.abs(stored(output, other) - stored(base, other) - change).max() < 1e-6


def test_modules_held_in_full_replace_the_models_own(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of("llama")
    config = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}
    expected = train(base, tmp_path / "adapter", **config)
    output = apply_edits(tmp_path, base, [EDIT])
    assert np.abs(logits(load_model(output)) - expected).max() <= 20 * noise(base)
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    head = kept["base_model.model.lm_head.weight"]
    assert (stored(output, "lm_head.weight") == head).all()
    with pytest.raises(InputError, match="scale must be 1"):
        plan_of(tmp_path, base, [{**EDIT, "scale": 0.5}])


def test_an_adapter_of_the_base_model_alone_fits_the_model_with_its_head(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Modules are found by their path with and without the prefix of the base model."""
    base = base_of("llama")
    write_adapter(tmp_path, base)
    first = apply_edits(tmp_path, base, [EDIT])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {k.replace("model.model.", "model."): v for k, v in load_file(path).items()}
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    shorter = json.loads(json.dumps(fields).replace("model.layers", "layers"))
    shorter["target_modules"].append("embed_tokens")
    other = tmp_path / "other"
    other.mkdir()
    save_adapter(other / "adapter", tensors, shorter)
    second = apply_edits(other, base, [EDIT])
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        assert (stored(first, name) == stored(second, name)).all()
        assert (stored(first, name) != stored(base, name)).any()


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "'use_dora' cannot be merged"),
    "stacks": ({"target_parameters": ["experts.down_proj"]}, "'target_parameters' cannot be"),
    "bias of B": ({"lora_bias": True}, "'lora_bias' cannot be merged"),
    "layers twice": ({"layer_replication": [[0, 1]]}, "'layer_replication' cannot"),
    "tokens": ({"trainable_token_indices": [1]}, "'trainable_token_indices' cannot"),
    "to come": ({"use_something_new": True}, "'use_something_new' cannot"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base"),
    "kind": ({"peft_type": "IA3"}, "'peft_type': Input should be 'LORA'"),
    "rank": ({"r": 5}, r"has rank 4, adapter_config.json makes it 5"),
    "rank 0": ({"r": 0}, "'r': Input should be greater than 0"),
    "alpha": ({"lora_alpha": "x"}, "'lora_alpha': "),
    "regex": ({"rank_pattern": {"(a+)+b": 4}}, r"'\(a\+\)\+b' is a regular expression"),
    "targets": ({"target_modules": ["q_proj"]}, "is no adapter of its config"),
    "layers": ({"layers_to_transform": 0}, r"layers\.1\.mlp\.up_proj\.lora_A.* and 3 more"),
}


@pytest.mark.parametrize("why", UNSUPPORTED)
def test_an_unsupported_config_is_refused(
    why: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    config, said = UNSUPPORTED[why]
    write_adapter(tmp_path, base_of("llama"), **config)
    with pytest.raises(InputError, match=said) as caught:
        plan_of(tmp_path, base_of("llama"), [EDIT])
    assert "edits[0]" in str(caught.value)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_an_adapter_for_another_model_is_refused_with_its_names(
    family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    write_adapter(tmp_path, base_of(family))
    with pytest.raises(InputError) as caught:
        plan_of(tmp_path, base_of("llama"), [EDIT])
    assert "lora_A" in str(caught.value) or "has shape" in str(caught.value)


def test_a_factor_without_the_other_is_refused(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    write_adapter(tmp_path, base_of("llama"))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    lost = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    tensors.pop(lost)
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"up_proj\.lora_A\.weight"):
        plan_of(tmp_path, base_of("llama"), [EDIT])


def test_a_parameter_the_config_does_not_train_is_refused(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    write_adapter(tmp_path, base_of("llama"))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    extra = {"base_model.model.model.norm.weight": random(32)}
    save_file({**load_file(path), **extra}, path)
    with pytest.raises(InputError, match=r"'base_model\.model\.model\.norm\.weight'"):
        plan_of(tmp_path, base_of("llama"), [EDIT])


def test_a_pickled_adapter_is_never_loaded(base_of: Callable[..., Path], tmp_path: Path) -> None:
    write_adapter(tmp_path, base_of("llama"))
    folder = tmp_path / "adapter"
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"only pickled weights .* never loaded"):
        plan_of(tmp_path, base_of("llama"), [EDIT])


def test_every_file_of_the_adapter_is_in_the_receipt(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    write_adapter(tmp_path, base_of("llama"))
    inputs = plan_of(tmp_path, base_of("llama"), [EDIT]).inputs
    assert set(inputs) == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
