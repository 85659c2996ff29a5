"""Facts against the config classes of transformers: defaults, pruning, experts, addresses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import MODELS, config_class, family_of, make
from oracles import load_model, logits

from surgery.addresses import Neuron
from surgery.arch import FAMILIES, Architecture, identify
from surgery.arch.facts import FamilyFacts, load_facts
from surgery.arch.sizes import evaluate, read_sizes
from surgery.checkpoint import Checkpoint
from surgery.errors import ArchitectureError, EditError


def facts_of(family: str) -> FamilyFacts:
    return load_facts(FAMILIES[family], {})


def opened(path: Path) -> Architecture:
    return identify(Checkpoint.open(path))


def test_every_family_is_tested() -> None:
    assert {family_of(name) for name in MODELS} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_config_class(family: str) -> None:
    """What a file leaves out means what transformers takes it for."""
    facts, default = facts_of(family), config_class(family)()
    written = default.to_dict()
    assert read_sizes(facts, {}) == read_sizes(facts, written)
    assert facts.tie.default is default.tie_word_embeddings
    if facts.activation.key:
        assert facts.activation.default == getattr(default, facts.activation.key)
    for key, value in facts.defaults.items():
        found: Any = written
        for name in key.split("."):
            found = found[name]
        assert (found or None) == (value or None), key


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "qwen3"])
def test_a_null_number_of_key_value_heads_means_one_for_each_head(family: str) -> None:
    fields = {"num_key_value_heads": None, "num_attention_heads": 16}
    expected = config_class(family)(**fields).num_key_value_heads
    assert read_sizes(facts_of(family), fields)["kv_heads"] == expected == 16


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_a_size_is_one_of_the_config_class(family: str) -> None:
    legacy = {"n_embed", "seq_length", "head_dim"}
    default = config_class(family)()
    for name, fact in facts_of(family).sizes.items():
        assert all(hasattr(default, key) for key in set(fact.keys) - legacy), name


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_that_facts_name_exist(family: str) -> None:
    facts = facts_of(family)
    named = [facts.tie.head, facts.tie.embed, *filter(None, [facts.tie.bias])]
    named += [module.norm for module in facts.modules.values() if module.norm]
    named += [steer.role for steer in facts.steer.values()]
    named += [steer.first for steer in facts.steer.values() if steer.first]
    assert set(named) <= facts.modules.keys()
    for steer in facts.steer.values():
        assert facts.modules[steer.role].bias


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bound_of_the_config_class_is_a_fact(family: str) -> None:
    clip, written = facts_of(family).clip, config_class(family)().to_dict()
    nested = [{f"{key}.{name}": 0 for name in v} for key, v in written.items() if type(v) is dict]
    keys = [key for fields in (written, *nested) for key in fields if "clip" in key]
    assert keys == ([] if clip is None else [clip])


@pytest.mark.parametrize("bound", [0.5, 0.0, None])
def test_a_bound_of_queries_keys_and_values_is_one_where_it_is_set(
    bound: float | None, base_of: Callable[..., Path]
) -> None:
    """Whatever leaves the projection, the output projection then reads nothing beyond it."""
    base = base_of("mpt", attn_config={"clip_qkv": bound})
    arch, model = opened(base), load_model(base)
    values = arch.module(model, "qkv_proj", 0)
    values.register_forward_hook(lambda module, inputs, output: 100 * output)
    read: list[float] = []
    output = arch.module(model, "o_proj", 0)
    output.register_forward_pre_hook(
        lambda module, inputs: read.append(float(inputs[0].abs().max()))
    )
    logits(model)
    assert arch.qkv_clip is bool(bound)
    assert (max(read) <= 0.5 + 1e-6) is arch.qkv_clip


@pytest.mark.parametrize("name", MODELS)
def test_heads_can_be_pruned_where_facts_say_so(
    name: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Three heads, or two, of the size that four had: stock transformers runs them or cannot."""
    facts = facts_of(family_of(name))
    size = opened(base_of(name)).sizes["head_dim"]
    keys = facts.sizes["heads"].keys

    def pruned(heads: int) -> Path:
        fields: dict[str, Any] = {keys[0]: heads}
        if family_of(name) != "falcon":  # its config class takes no head_dim at all
            fields["head_dim"] = size
        if facts.sizes["kv_heads"].keys == ["num_key_value_heads"]:
            fields["num_key_value_heads"] = 1
        return make(name, tmp_path / str(heads), **fields)

    if facts.prune.heads == "never":
        arch = opened(pruned(2))
        assert arch.sizes["head_dim"] == 2 * size
        assert arch.shape("o_proj") == (32, 32)
        return
    assert facts.sizes["head_dim"].keys == ["head_dim"]
    for heads in (3, 2):
        if heads == 3 and facts.prune.heads == "divisor":
            with pytest.raises(Exception, match="not a multiple of the number of attention"):
                pruned(heads)
            continue
        arch = opened(pruned(heads))
        assert arch.shape("o_proj") == (32, heads * size)
        assert logits(load_model(tmp_path / str(heads))).std() > 0


@pytest.mark.parametrize(
    ("config", "sparse"),
    [
        ({"mlp_only_layers": []}, {0, 1}),
        ({"mlp_only_layers": [1]}, {0}),
        ({"mlp_only_layers": None, "decoder_sparse_step": 2}, {1}),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, set()),
    ],
)
def test_experts_are_in_the_layers_the_config_says(
    config: dict[str, Any], sparse: set[int], tmp_path: Path
) -> None:
    arch = opened(make("qwen3_moe", tmp_path / "m", **config))
    assert arch.sparse == sparse
    assert set(arch.layers_of("router")) == sparse
    assert set(arch.layers_of("down_proj")) == {0, 1} - sparse


@pytest.mark.parametrize(
    ("neuron", "said"),
    [
        (
            Neuron(1, 0),
            "layer 1 of this qwen3_moe model has experts; expected an address like L1E0N0",
        ),
        (Neuron(0, 5, 1), "layer 0 of this qwen3_moe model has no experts; .* like L0N5"),
        (Neuron(1, 0, 3), "L1E3N0: expert 3 is out of range; .* experts 0 to 2"),
        (Neuron(1, 40, 2), "L1E2N40: neuron 40 is out of range; .* neurons 0 to 39"),
        (Neuron(0, 48), "neuron 48 is out of range"),
        (Neuron(2, 0, 0), "layer 2 is out of range"),
    ],
)
def test_an_address_without_a_neuron_says_which_there_are(
    neuron: Neuron, said: str, base_of: Callable[..., Path]
) -> None:
    arch = opened(base_of("qwen3_moe"))
    for regions in (arch.neuron_region, arch.gate_up_regions):
        with pytest.raises(EditError, match=said):
            regions(neuron)


def test_what_an_activation_is_called_and_what_it_is(tmp_path: Path) -> None:
    """Gemma's first configs say gelu and mean its approximation."""
    path = make("gemma", tmp_path / "m")
    config = path / "config.json"
    config.write_text(config.read_text().replace('"gelu_pytorch_tanh"', '"gelu"'))
    assert opened(path).activation == "gelu_pytorch_tanh"
    assert load_model(path).config.hidden_act == "gelu_pytorch_tanh"


@pytest.mark.parametrize(
    ("name", "config", "turned"),
    [
        ("gpt_neox", {"rope_parameters": None}, 2),
        ("gpt_neox", {"rope_parameters": None, "rotary_pct": 0.5}, 4),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.5}}, 4),
        ("phi3", {"rope_parameters": None}, 8),
        ("phi3", {"rope_parameters": None, "partial_rotary_factor": 0.5}, 4),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default"}}, 4),
    ],
)
def test_old_and_new_configs_say_how_much_of_a_head_is_rotated(
    name: str, config: dict[str, Any], turned: int, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(base_of(name), tmp_path / "m")
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | config
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    frequencies = load_model(folder).base_model.rotary_emb.inv_freq
    assert opened(folder).rotary_dim == 2 * len(frequencies) == turned


def test_sizes_are_sums_of_products() -> None:
    sizes = {"a": 7, "b": 2, "zero": 0}
    assert evaluate("a+2*b-1", sizes) == 10
    assert evaluate("a//b*b", sizes) == 6
    assert evaluate("2", sizes) == evaluate(2, sizes) == 2
    with pytest.raises(ArchitectureError, match="zero is 0"):
        evaluate("a//zero", sizes)
