"""Model families: facts as JSON, one file each, and `identify`, which maps a checkpoint to one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from surgery.arch.facts import FamilyFacts, ModuleFact, load_facts
from surgery.arch.interface import (
    Architecture,
    BiasSlot,
    Role,
    Writer,
    describe,
    evaluate,
    tensor_name,
)
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import ArchitectureError, quote

FAMILIES: Mapping[str, str] = {
    "bert": "bert.json",
    "gpt2": "gpt2.json",
    "llama": "llama.json",
    "qwen3": "qwen3.json",
}
"""`model_type` of a config to the file of its facts."""

_MAX_LAYERS = 100_000
_MAX_SIZE = 2**31 - 1

__all__ = ["FAMILIES", "Architecture", "BiasSlot", "Role", "Writer", "extend", "identify"]


def identify(checkpoint: Checkpoint) -> Architecture:
    """The architecture of `checkpoint`, every stored tensor claimed by exactly one role.

    Raises `ArchitectureError` for an unknown family, a config that contradicts itself, a tensor
    no role claims, one of another shape than the config gives, or one that is missing.
    """
    try:
        return _identify(checkpoint)
    except ArchitectureError as error:
        raise ArchitectureError(f"{checkpoint.root}: {error}") from None


def _identify(checkpoint: Checkpoint) -> Architecture:
    config = checkpoint.config
    facts = _facts(config.get("model_type"))
    _refuse_quirks(facts, config)
    sizes = _sizes(facts, config)
    prefix = _prefix(facts, checkpoint.tensors)
    roles = _claim(facts, sizes, prefix, config)
    tied = config.get("tie_word_embeddings", facts.tie.default) is not False
    _check_tensors(checkpoint, facts, sizes, prefix, roles, tied)
    stored = {name: roles[name] for name in checkpoint.tensors if name in roles}
    return Architecture(facts, sizes, stored, prefix, tied and _has_head(facts, stored))


def extend(arch: Architecture, config: Mapping[str, Any], names: Iterable[str]) -> Architecture:
    """`arch` once the tensors `names` are stored and the config is `config`."""
    roles = _claim(arch.facts, arch.sizes, arch.prefix, config)
    tied = arch.tied and config.get("tie_word_embeddings") is not False
    added = {name: roles[name] for name in names}
    return replace(arch, roles={**arch.roles, **added}, tied=tied)


def _has_head(facts: FamilyFacts, roles: Mapping[str, Role]) -> bool:
    """Whether a tied head can exist: in every decoder, and in encoders that store its parts."""
    return facts.kind == "decoder" or any(role.role.startswith("mlm_") for role in roles.values())


def _facts(model_type: Any) -> FamilyFacts:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ArchitectureError(
            f"config.json: model_type {quote(model_type)} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    return load_facts(FAMILIES[model_type])


def _refuse_quirks(facts: FamilyFacts, config: Mapping[str, Any]) -> None:
    refused = {"quantization_config": "packed weights cannot be edited", **facts.refuse}
    for key, reason in refused.items():
        if config.get(key):
            raise ArchitectureError(f"config.json: {key} is set: {reason}")


def _sizes(facts: FamilyFacts, config: Mapping[str, Any]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, fact in facts.sizes.items():
        value = config.get(fact.key) if fact.key else None
        if value is None:
            value = evaluate(fact.default, sizes)
        if type(value) is not int or not 0 < value <= _MAX_SIZE:
            raise ArchitectureError(
                f"config.json: {fact.key or name} is {ascii(value)[:80]}; "
                f"expected an integer from 1 to {_MAX_SIZE}"
            )
        sizes[name] = value
    if sizes["layers"] > _MAX_LAYERS:
        raise ArchitectureError(f"config.json: {sizes['layers']} layers is more than {_MAX_LAYERS}")
    if sizes["heads"] % sizes["kv_heads"]:
        raise ArchitectureError("config.json: heads must be a multiple of key-value heads")
    sizes["z_width"] = sizes["heads"] * sizes["head_dim"]
    sizes["kv_width"] = sizes["kv_heads"] * sizes["head_dim"]
    return sizes


def _prefix(facts: FamilyFacts, tensors: Mapping[str, TensorInfo]) -> str:
    embed = facts.modules[facts.tie.embed]
    for prefix in facts.prefixes:
        if tensor_name(embed, prefix, None, "weight") in tensors:
            return prefix
    expected = tensor_name(embed, facts.prefixes[0], None, "weight")
    raise ArchitectureError(
        f"a {facts.model_type} checkpoint must have {expected!r}; found {describe(tensors)}"
    )


def _claim(
    facts: FamilyFacts, sizes: Mapping[str, int], prefix: str, config: Mapping[str, Any]
) -> dict[str, Role]:
    """Every tensor name the family can have under this config, with its role."""
    roles: dict[str, Role] = {}
    for role, module in facts.modules.items():
        for layer in range(sizes["layers"]) if module.per_layer else [None]:
            for kind in _kinds(module, config):
                roles[tensor_name(module, prefix, layer, kind)] = Role(role, layer, kind)
    return roles


def _kinds(module: ModuleFact, config: Mapping[str, Any]) -> tuple[str, ...]:
    if module.type == "bias":
        return ("bias",)
    bias = module.bias
    if isinstance(bias, str) and bias != "optional":
        bias = bool(config.get(bias))
    return ("weight", "bias") if bias else ("weight",)


def _check_tensors(
    checkpoint: Checkpoint,
    facts: FamilyFacts,
    sizes: Mapping[str, int],
    prefix: str,
    roles: Mapping[str, Role],
    tied: bool,
) -> None:
    ignored = [re.escape(f"{prefix}{name}").replace(r"\{layer\}", r"\d+") for name in facts.ignored]
    unclaimed = [
        name
        for name in checkpoint.tensors
        if name not in roles and not any(re.fullmatch(pattern, name) for pattern in ignored)
    ]
    if unclaimed:
        raise ArchitectureError(
            f"no role of {facts.model_type} claims {describe(unclaimed)}; "
            "this variant of the family is not supported"
        )
    missing = [n for n, r in roles.items() if n not in checkpoint.tensors and _needed(facts, r)]
    if missing:
        raise ArchitectureError(f"lacks {describe(missing)}")
    for name, role in roles.items():
        if name in checkpoint.tensors:
            _check_shape(checkpoint, name, facts.modules[role.role], role.kind, sizes)
    head = tensor_name(facts.modules[facts.tie.head], prefix, None, "weight")
    causal = facts.kind == "decoder" and any("ForCausalLM" in a for a in _architectures(checkpoint))
    if causal and not tied and head not in checkpoint.tensors:
        raise ArchitectureError(f"is untied but lacks {head!r}")


def _architectures(checkpoint: Checkpoint) -> list[str]:
    named = checkpoint.config.get("architectures")
    return [str(name) for name in named] if isinstance(named, list) else []


def _needed(facts: FamilyFacts, role: Role) -> bool:
    module = facts.modules[role.role]
    return not module.optional and not (role.kind == "bias" and module.bias == "optional")


def _check_shape(
    checkpoint: Checkpoint, name: str, module: ModuleFact, kind: str, sizes: Mapping[str, int]
) -> None:
    names = module.bias_shape() if kind == "bias" else module.weight_shape()
    found = checkpoint.tensors[name].shape
    expected = tuple(
        found[axis] if size == "any" and axis < len(found) else evaluate(size, sizes)
        for axis, size in enumerate(names)
    )
    if found != expected:
        raise ArchitectureError(
            f"{quote(name)} has shape {list(found)}, config.json makes it {list(expected)}"
        )
