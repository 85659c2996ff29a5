"""Every stored tensor is claimed by one role of the right shape, or the model is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, family_of, make
from oracles import load_model, logits

from surgery.arch import identify
from surgery.checkpoint import SINGLE, Checkpoint
from surgery.errors import ArchitectureError


def changed(
    base: Path, folder: Path, config: dict[str, Any] | None = None, **tensors: Any
) -> Checkpoint:
    """A copy of `base` with other config fields and tensors (None takes one away)."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(base, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    kept = {**load_file(base / SINGLE), **tensors}
    save_file({n: t for n, t in kept.items() if t is not None}, folder / SINGLE)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_has_a_role_and_is_that_part_of_the_live_model(
    name: str, base_of: Callable[..., Path]
) -> None:
    checkpoint = Checkpoint.open(base_of(name))
    arch = identify(checkpoint)
    model = load_model(base_of(name))
    assert set(arch.roles) == set(checkpoint.tensors)
    assert len(set(arch.roles.values())) == len(arch.roles)
    assert arch.family == family_of(name)
    for tensor in arch.roles:
        live = arch.parameter(model, tensor).detach().numpy()
        assert live.shape == checkpoint.info(tensor).shape
        assert live.tobytes() == bytes(checkpoint.read_bytes(tensor)), tensor


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_the_live_model_is_some_tensor(
    name: str, base_of: Callable[..., Path]
) -> None:
    """Written over through the roles, no parameter keeps a number of its own."""
    arch = identify(Checkpoint.open(base_of(name)))
    model = load_model(base_of(name))
    with torch.no_grad():
        for tensor in arch.roles:
            arch.parameter(model, tensor).fill_(torch.nan)
    assert all(parameter.isnan().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_ties_are_those_of_the_live_model(name: str, base_of: Callable[..., Path]) -> None:
    model = load_model(base_of(name))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    arch = identify(Checkpoint.open(base_of(name)))
    assert arch.tied is (head.weight is embedding.weight)
    assert arch.module(model, arch.facts.tie.embed) is embedding
    assert arch.module(model, arch.facts.tie.head) is head


@pytest.mark.parametrize("name", MODELS)
def test_a_base_model_without_its_head_is_the_same_family(
    name: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    load_model(base_of(name)).base_model.save_pretrained(tmp_path / "base")
    arch = identify(Checkpoint.open(tmp_path / "base"))
    assert arch.prefix == ""
    assert arch.roles


@pytest.mark.parametrize("name", MODELS)
def test_stock_transformers_reads_what_is_claimed(name: str, base_of: Callable[..., Path]) -> None:
    import transformers

    cls = getattr(transformers, MODELS[name][0])
    _, report = cls.from_pretrained(base_of(name), output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_old_bert_files_call_the_parameters_of_norms_gamma_and_beta(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    tensors: dict[str, Any] = {}
    for name, tensor in load_file(base_of("bert") / SINGLE).items():
        if "LayerNorm" in name:
            old = name.replace("weight", "gamma").replace("bias", "beta")
            tensors |= {name: None, old: tensor}
    checkpoint = changed(base_of("bert"), tmp_path / "m", **tensors)
    arch = identify(checkpoint)
    assert set(arch.roles) == set(checkpoint.tensors)
    assert arch.name("attention_norm", 1, "bias").endswith("attention.output.LayerNorm.beta")
    assert (logits(load_model(tmp_path / "m")) == logits(load_model(base_of("bert")))).all()


@pytest.mark.parametrize(
    ("family", "buffers"),
    [
        ("gptj", ("h.0.attn.bias", "h.1.attn.masked_bias")),
        ("gpt_neox", ("layers.0.attention.bias", "layers.1.attention.rotary_emb.inv_freq")),
        ("bert", ("embeddings.position_ids",)),
        ("roberta", ("embeddings.position_ids",)),
        ("llama", ("layers.0.self_attn.rotary_emb.inv_freq",)),
    ],
)
def test_buffers_of_old_files_have_no_role(
    family: str, buffers: tuple[str, ...], base_of: Callable[..., Path], tmp_path: Path
) -> None:
    import numpy as np

    prefix = identify(Checkpoint.open(base_of(family))).prefix
    added = {f"{prefix}{name}": np.ones(3, np.float32) for name in buffers}
    arch = identify(changed(base_of(family), tmp_path / "m", **added))
    assert not set(added) & set(arch.roles)


def test_old_gpt2_files_carry_mask_buffers(base_of: Callable[..., Path], tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    tensors: dict[str, Any] = {}
    for name, tensor in load_file(base_of("gpt2") / SINGLE).items():
        tensors |= {name: None, name.removeprefix("transformer."): tensor}
    tensors |= {f"h.{i}.attn.bias": np.ones((1, 1, 64, 64), np.float32) for i in range(2)}
    arch = identify(changed(base_of("gpt2"), tmp_path / "m", **tensors))
    assert "h.0.attn.bias" not in arch.roles
    assert "h.0.attn.c_proj.weight" in arch.roles


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        (
            "llama",
            {"model_type": "mamba"},
            "'mamba' is not supported; nearest: llama; supp",
        ),
        ("llama", {"model_type": None}, "model_type"),
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("llama", {"quantization_config": {"bits": 4}}, "packed weights"),
        ("bert", {"is_decoder": True}, "decoder BERT"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
        ("gpt2", {"n_layer": 3}, "lacks"),
        ("gpt2", {"n_layer": 1}, "no role of gpt2 claims"),
        ("gpt2", {"n_layer": 2**31}, "expected an integer from 1"),
        ("gpt2", {"n_layer": 2**30}, "more than"),
        ("gpt2", {"n_head": 0}, "expected an integer from 1"),
        ("gpt2", {"n_head": 64}, "expected an integer from 1|has shape"),
        ("gpt2", {"n_embd": -32}, "expected an integer from 1"),
        ("gpt2", {"n_embd": 32.0}, "expected an integer from 1"),
        ("gpt2", {"n_embd": True}, "expected an integer from 1"),
        ("llama", {"hidden_size": 64}, "has shape"),
        ("llama", {"num_key_value_heads": 3}, "multiple of key-value heads"),
        ("llama", {"num_key_value_heads": 4}, "has shape"),
        ("llama", {"vocab_size": 102}, "has shape"),
        ("llama", {"attention_bias": True}, "lacks"),
        ("qwen3", {"head_dim": 8}, "has shape"),
        ("qwen3", {"tie_word_embeddings": False}, "is untied but lacks 'lm_head.weight'"),
        ("llama", {"model_type": "gpt-neox"}, "nearest: gpt_neox"),
        ("llama", {"model_type": "qwen2_moe"}, "nearest: qwen3_moe, qwen2"),
        ("llama", {"model_type": "zzz"}, "'zzz' is not supported; supported: bert"),
        ("gpt2", {"num_hidden_layers": 3}, "n_layer 2 and num_hidden_layers 3 are one size"),
        ("opt", {"do_layer_norm_before": False}, "as in OPT-350m, are not described"),
        ("opt", {"layer_norm_elementwise_affine": False}, "norms without weights"),
        ("opt", {"enable_bias": False}, "no role of opt claims"),
        ("opt-unbiased", {"enable_bias": True}, "lacks"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "only the new decoder has two norms"),
        ("falcon-new", {"parallel_attn": False}, "the new decoder is always parallel"),
        ("falcon-one-norm", {"new_decoder_architecture": False}, "has shape"),
        ("falcon", {"multi_query": False}, "has shape .48, 32., config.json makes it .96, 32."),
        ("falcon", {"bias": True}, "lacks"),
        ("falcon-rw", {"num_kv_heads": 2}, "has shape"),
        ("mpt", {"attn_config": {"alibi": False}}, "learned positions are not described"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "norms of queries and keys"),
        ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}, "multi-query attention"),
        ("mpt", {"attn_config": {"prefix_lm": True}}, "prefix attention"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "the stream is then"),
        ("gptj", {"rotary_dim": None}, "the whole width is rotated"),
        ("phi3", {"num_key_value_heads": 4}, "has shape"),
        ("roberta", {"is_decoder": True}, "decoder RoBERTa"),
        ("roberta", {"pad_token_id": 64}, "positions is -1"),
        ("mixtral", {"num_local_experts": 2}, "no role of mixtral claims"),
        ("mixtral", {"num_local_experts": 4}, "lacks"),
        ("mixtral", {"num_local_experts": 2**30}, "is more than 1000000"),
        ("qwen3_moe", {"num_experts": 4}, "num_experts 4 and num_local_experts 3 are one size"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "expected an integer from 1"),
        ("qwen3_moe", {"mlp_only_layers": "0"}, "expected a list of layers"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "no role of qwen3_moe claims"),
    ],
)
def test_a_config_that_is_not_this_model_is_refused(
    family: str, config: dict[str, Any], said: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ArchitectureError, match=said) as caught:
        identify(changed(base_of(family), tmp_path / "m", config))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", MODELS)
def test_packed_weights_are_refused(
    name: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    packed = changed(base_of(name), tmp_path / "m", {"quantization_config": {"bits": 4}})
    with pytest.raises(ArchitectureError, match="quantization_config is set: packed weights"):
        identify(packed)


def test_embeddings_of_another_width_are_refused(tmp_path: Path) -> None:
    made = make("opt", tmp_path / "m", word_embed_proj_dim=16)
    with pytest.raises(ArchitectureError, match=r"no role of opt claims .*project_in\.weight"):
        identify(Checkpoint.open(made))


@pytest.mark.parametrize("name", ["model.layers.2.x", "../../x", "<script>", "model.norm.bias"])
def test_a_tensor_no_role_claims_is_refused(
    name: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    import numpy as np

    checkpoint = changed(base_of("llama"), tmp_path / "m", **{name: np.ones(32, np.float32)})
    with pytest.raises(ArchitectureError, match="no role of llama claims"):
        identify(checkpoint)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
             "model.layers.1.self_attn.k_proj.weight"],
)  # fmt: skip
def test_a_missing_tensor_is_named(name: str, base_of: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = changed(base_of("llama"), tmp_path / "m", **{name: None})
    with pytest.raises(ArchitectureError, match=name):
        identify(checkpoint)
