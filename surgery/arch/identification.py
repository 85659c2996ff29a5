"""`identify`: which family a checkpoint is of, every tensor of it claimed by exactly one role."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from surgery.arch.facts import ExpertsFact, FamilyFacts, ModuleFact, load_facts
from surgery.arch.families import FAMILIES
from surgery.arch.interface import Architecture, layers_of
from surgery.arch.naming import Naming
from surgery.arch.roles import Role
from surgery.arch.settings import Settings
from surgery.arch.sizes import evaluate, read_sizes
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import ArchitectureError, describe, quote


def identify(checkpoint: Checkpoint) -> Architecture:
    """The architecture of `checkpoint`, every stored tensor claimed by exactly one role.

    Raises `ArchitectureError` for an unknown family, a variant of one that is not described, a
    config that contradicts itself, a tensor no role claims, one of another shape than the config
    gives, or one that is missing.
    """
    try:
        return _identify(checkpoint)
    except ArchitectureError as error:
        raise ArchitectureError(f"{checkpoint.root}: {error}") from None


def _identify(checkpoint: Checkpoint) -> Architecture:
    facts = _facts(checkpoint.config)
    settings = Settings(checkpoint.config, facts.defaults)
    _refuse_variants(facts, settings)
    sizes = read_sizes(facts, checkpoint.config)
    family = _Family(
        facts,
        settings,
        sizes,
        _naming(facts, checkpoint.tensors),
        _sparse(facts.experts, settings, sizes["layers"]),
    )
    roles = family.claim()
    tied = checkpoint.config.get("tie_word_embeddings", facts.tie.default) is not False
    family.check(checkpoint, roles, tied)
    stored = {name: roles[name] for name in checkpoint.tensors if name in roles}
    tied = tied and _has_head(facts, stored)
    return Architecture(facts, settings, sizes, stored, family.naming, tied, family.sparse)


def extend(arch: Architecture, config: Mapping[str, Any], names: Iterable[str]) -> Architecture:
    """`arch` once the tensors `names` are stored and the config is `config`."""
    settings = replace(arch.settings, config=config)
    roles = _Family(arch.facts, settings, arch.sizes, arch.naming, arch.sparse).claim()
    tied = arch.tied and config.get("tie_word_embeddings") is not False
    added = {name: roles[name] for name in names}
    return replace(arch, settings=settings, roles={**arch.roles, **added}, tied=tied)


def widened(arch: Architecture, grows: Mapping[str, int]) -> tuple[Architecture, dict[str, int]]:
    """`arch` once the sizes `grows` are larger by so much, and the config fields that say so."""
    fields = {
        key: arch.sizes[name] + by for name, by in grows.items() for key in arch.config_keys(name)
    }
    config = {**arch.settings.config, **fields}
    settings = replace(arch.settings, config=config)
    return replace(arch, settings=settings, sizes=read_sizes(arch.facts, config)), fields


def _has_head(facts: FamilyFacts, roles: Mapping[str, Role]) -> bool:
    """Whether a tied head can exist: in every decoder, and in encoders that store its parts."""
    return facts.kind == "decoder" or any(role.role.startswith("mlm_") for role in roles.values())


def _facts(config: Mapping[str, Any]) -> FamilyFacts:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type)[:80], FAMILIES, n=3, cutoff=0.5)
        nearest = f"nearest: {', '.join(near)}; " if near else ""
        raise ArchitectureError(
            f"config.json: model_type {quote(model_type)} is not supported; {nearest}"
            f"supported: {', '.join(FAMILIES)}"
        )
    return load_facts(FAMILIES[model_type], config)


def _refuse_variants(facts: FamilyFacts, settings: Settings) -> None:
    if settings.get("quantization_config"):
        raise ArchitectureError(
            "config.json: quantization_config is set: packed weights cannot be edited"
        )
    for refused in facts.refuse:
        if settings.matches(refused.when):
            found = ", ".join(f"{key} {ascii(settings.get(key))[:40]}" for key in refused.when)
            raise ArchitectureError(
                f"config.json: this variant of {facts.model_type} ({found}) is not supported: "
                f"{refused.reason}"
            )


def _naming(facts: FamilyFacts, tensors: Mapping[str, TensorInfo]) -> Naming:
    embed = facts.modules[facts.tie.embed]
    old = any(name.endswith(tuple(f".{alias}" for alias in facts.aliases)) for name in tensors)
    norms = {kind: alias for alias, kind in facts.aliases.items()} if old else {}
    for prefix in facts.prefixes:
        if Naming(prefix).tensor(embed, None, "weight") in tensors:
            return Naming(prefix, norms)
    expected = Naming(facts.prefixes[0]).tensor(embed, None, "weight")
    raise ArchitectureError(
        f"a {facts.model_type} checkpoint must have {expected!r}; found {describe(tensors)}"
    )


def _sparse(fact: ExpertsFact | None, settings: Settings, layers: int) -> frozenset[int]:
    """The layers with experts; raises `ArchitectureError` where the config does not say them."""
    if fact is None:
        return frozenset()
    step = settings.get(fact.step) if fact.step else 1
    dense = settings.get(fact.dense) if fact.dense else None
    if type(step) is not int or step < 1:
        raise ArchitectureError(
            f"config.json: {fact.step} is {quote(step)}; expected an integer from 1"
        )
    if not isinstance(dense, list | None) or any(type(layer) is not int for layer in dense or ()):
        raise ArchitectureError(
            f"config.json: {fact.dense} is {quote(dense)}; expected a list of layers"
        )
    every = range(step - 1, layers, step)
    return frozenset(every) - frozenset(dense or ())


@dataclass(frozen=True)
class _Family:
    """One config of a family in one file's spelling, before its tensors are known."""

    facts: FamilyFacts
    settings: Settings
    sizes: Mapping[str, int]
    naming: Naming
    sparse: frozenset[int]

    def claim(self) -> dict[str, Role]:
        """Every tensor name the family can have under this config, with its role."""
        return {
            self.naming.tensor(module, layer, kind, expert): Role(role, layer, kind, expert)
            for role, module in self.facts.modules.items()
            for layer, expert in self._places(module)
            for kind in self._kinds(module)
        }

    def _places(self, module: ModuleFact) -> Iterator[tuple[int | None, int | None]]:
        experts = range(self.sizes["experts"]) if module.per_expert else (None,)
        layers: tuple[int | None, ...] = (None,)
        if module.per_layer:
            layers = layers_of(module, self.sizes["layers"], self.sparse)
        return ((layer, expert) for layer in layers for expert in experts)

    def _kinds(self, module: ModuleFact) -> tuple[str, ...]:
        if module.type == "bias":
            return ("bias",)
        bias = module.bias
        if isinstance(bias, str) and bias != "optional":
            bias = bool(self.settings.get(bias))
        return ("weight", "bias") if bias else ("weight",)

    def check(self, checkpoint: Checkpoint, roles: Mapping[str, Role], tied: bool) -> None:
        """Raises `ArchitectureError` unless the tensors of `checkpoint` are those of `roles`."""
        self._refuse_unclaimed(checkpoint.tensors, roles)
        missing = [n for n, r in roles.items() if n not in checkpoint.tensors and self._needed(r)]
        if missing:
            raise ArchitectureError(f"lacks {describe(missing)}")
        for name, role in roles.items():
            if name in checkpoint.tensors:
                self._check_shape(checkpoint.tensors[name], role)
        head = self.naming.tensor(self.facts.modules[self.facts.tie.head], None, "weight")
        if _is_causal(self.facts, checkpoint) and not tied and head not in checkpoint.tensors:
            raise ArchitectureError(f"is untied but lacks {head!r}")

    def _refuse_unclaimed(
        self, tensors: Mapping[str, TensorInfo], roles: Mapping[str, Role]
    ) -> None:
        names = (re.escape(f"{self.naming.prefix}{name}") for name in self.facts.ignored)
        ignored = [name.replace(r"\{layer\}", r"\d+") for name in names]
        unclaimed = [
            name
            for name in tensors
            if name not in roles and not any(re.fullmatch(pattern, name) for pattern in ignored)
        ]
        if unclaimed:
            raise ArchitectureError(
                f"no role of {self.facts.model_type} claims {describe(unclaimed)}; "
                "this variant of the family is not supported"
            )

    def _needed(self, role: Role) -> bool:
        module = self.facts.modules[role.role]
        return not module.optional and not (role.kind == "bias" and module.bias == "optional")

    def _check_shape(self, info: TensorInfo, role: Role) -> None:
        module = self.facts.modules[role.role]
        names = module.shape(role.kind)
        expected = tuple(
            info.shape[axis] if size == "any" else evaluate(size, self.sizes)
            for axis, size in enumerate(names)
            if axis < len(info.shape)
        )
        if info.shape != expected or len(names) != len(expected):
            made = [size if size == "any" else evaluate(size, self.sizes) for size in names]
            raise ArchitectureError(
                f"{quote(info.name)} has shape {list(info.shape)}, config.json makes it {made}"
            )


def _is_causal(facts: FamilyFacts, checkpoint: Checkpoint) -> bool:
    named = checkpoint.config.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    return facts.kind == "decoder" and any("ForCausalLM" in name for name in names)
