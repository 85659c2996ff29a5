"""`lora`: merge a PEFT adapter folder into the weights (LoRA, arXiv 2106.09685).

ΔW = scale · B·A for each module, scale = lora_alpha / r, or lora_alpha / √r with `use_rslora`
(arXiv 2312.03732); transposed for Conv1D and for embeddings. Trained biases and the modules of
`modules_to_save` replace the model's own. The live model adds scale · B(A(x)) to the module's
output, which is what PEFT does without merging.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from surgery.arch import Architecture, Role
from surgery.checkpoint import TensorFile
from surgery.checkpoint.files import parse_json_object, read_small
from surgery.edits.changes import Change, Factor, Product, Replacement, TensorChanges, input_axis
from surgery.edits.interface import Fields, RecipeFiles
from surgery.errors import EditError, RecipeError, describe, quote

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

T = TypeVar("T")

_PREFIX = "base_model.model."
_PAIRS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
_WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "task_type",
)  # fmt: skip
"""Fields that change nothing of what a saved adapter adds; `fan_in_fan_out` follows from the
module's own type, as PEFT has it too."""
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base as it is; with the others (PiSSA, OLoRA, CorDA, LoftQ) B·A is
relative to a base that was changed."""
_KEY = re.compile(
    r"base_model\.model\.(?P<path>.+?)\."
    r"(?:base_layer\.)?(?P<name>lora_[AB]\.weight|lora_embedding_[AB]|weight|bias)"
)
_PATTERN = re.compile(r"\^?[\w.]+")


class LoraFields(Fields):
    """`{op: lora, adapter: adapter_dir, scale: 1.0}`; `scale` multiplies what the adapter adds."""

    op: Literal["lora"]
    adapter: str
    scale: float = 1.0

    def build(self, arch: Architecture, files: RecipeFiles) -> LoraEdit:
        folder = self.adapter.rstrip("/")
        config_path = files.path(f"{folder}/{CONFIG}")
        if not (config_path.parent / WEIGHTS).exists() and (config_path.parent / PICKLE).exists():
            raise RecipeError(
                f"{config_path.parent}: only pickled weights ({PICKLE}), which are never loaded; "
                "save the adapter again with safe_serialization=True"
            )
        config = read_config(config_path)
        file = TensorFile.open(files.path(f"{folder}/{WEIGHTS}"))
        return LoraEdit(dict(_Adapter(arch, config, file, self.scale).changes()))


class AdapterConfig(BaseModel):
    """`adapter_config.json`, as far as it says what a saved adapter adds."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: float
    use_rslora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    init_lora_weights: Any = True

    def rank(self, path: str) -> int:
        """The rank of the module at `path`."""
        return _by_pattern(self.rank_pattern, path, self.r)

    def scale(self, path: str) -> float:
        """What B·A of the module at `path` is multiplied by."""
        rank = self.rank(path)
        alpha = _by_pattern(self.alpha_pattern, path, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, path: str, layer: int | None) -> bool:
        """Whether PEFT would give the module an adapter; taken from the file where
        `target_modules` is an expression and no list of names."""
        if not isinstance(self.target_modules, list):
            return True
        layers = self.layers_to_transform
        chosen = [layers] if isinstance(layers, int) else layers
        return _named(self.target_modules, path) and (not chosen or layer in chosen)

    def saves(self, path: str, kind: str) -> bool:
        """Whether the adapter holds this parameter in full."""
        parts = path.split(".")
        parents = [".".join(parts[:stop]) for stop in range(1, len(parts) + 1)]
        # PEFT takes any module whose path ends so, "input_layernorm" for "norm" too.
        names = tuple(self.modules_to_save or ())
        return any(parent.endswith(names) for parent in parents) or (
            self.bias != "none" and kind == "bias"
        )


def _named(names: list[str], path: str) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first pattern that names the module: the end of its path, or all of it
    after `^`."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^")
        if path == name or (name == pattern and path.endswith(f".{name}")):
            return value
    return default


def read_config(path: Path) -> AdapterConfig:
    """The config at `path`; raises `RecipeError` for a malformed one and for features that a plain
    product does not hold."""
    try:
        config = AdapterConfig.model_validate(parse_json_object(read_small(path), str(path)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{path}: {quote(where)}: {first['msg']}") from None
    _refuse_unsupported(path, config)
    return config


def _refuse_unsupported(path: Path, config: AdapterConfig) -> None:
    extra = config.model_extra or {}
    unsupported = [name for name, value in extra.items() if value and name not in _WITHOUT_EFFECT]
    if unsupported:
        raise RecipeError(
            f"{path}: {describe(sorted(unsupported))} cannot be merged as scale · B·A; only plain "
            "LoRA is supported"
        )
    if config.init_lora_weights not in _PLAIN_INITS:
        raise RecipeError(
            f"{path}: init_lora_weights is {quote(config.init_lora_weights)}, which changes the "
            "base; save the adapter again converted to plain LoRA"
        )
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not _PATTERN.fullmatch(pattern):
            raise RecipeError(
                f"{path}: the pattern {quote(pattern)} is a regular expression; write module names"
            )


@dataclass(frozen=True)
class _Adapter:
    """The file of an adapter, read for one model."""

    arch: Architecture
    config: AdapterConfig
    file: TensorFile
    strength: float

    def changes(self) -> Iterator[tuple[str, Change]]:
        """What the adapter does to each tensor it touches, by the keys of its file.

        Raises `EditError` naming the keys that are nothing of this model under this config.
        """
        modules, unknown = _live_modules(self.arch), []
        for key in self.file.tensors:
            match = _KEY.fullmatch(key)
            role = modules.get(match["path"]) if match else None
            if match is None or role is None or not self._expects(match, role):
                unknown.append(key)
            elif match["name"] in ("weight", "bias"):
                yield self._parameter(role, match["name"]), self._whole(key)
            elif match["name"] in _PAIRS:
                yield self._parameter(role, "weight"), self._product(match, role)
        if unknown:
            raise EditError(
                f"{self.file.path}: is no adapter of its config for this {self.arch.family} "
                f"model: {describe(unknown)}"
            )

    def _expects(self, match: re.Match[str], role: Role) -> bool:
        """Whether a key stands for something: a parameter held in full, or one factor of a module
        that the config names, whose other factor is there too."""
        path, name = match["path"], match["name"]
        if name in ("weight", "bias"):
            head = self.arch.name(self.arch.facts.tie.head)
            stored = {*self.arch.roles, head}
            return self.config.saves(path, name) and self._parameter(role, name) in stored
        other = {**_PAIRS, **{second: first for first, second in _PAIRS.items()}}[name]
        embedding = self.arch.facts.modules[role.role].type == "embedding"
        return (
            f"{_PREFIX}{path}.{other}" in self.file.tensors
            and name.startswith("lora_embedding") == embedding
            and self.config.targets(path, role.layer)
        )

    def _parameter(self, role: Role, kind: str) -> str:
        """The tensor a parameter is stored as: of a tied head's bias, the one it is tied to."""
        tie = self.arch.facts.tie
        if self.arch.tied and (role.role, kind) == (tie.head, "bias") and tie.bias is not None:
            return self.arch.name(tie.bias)
        return self.arch.name(role.role, role.layer, kind, role.expert)

    def _whole(self, key: str) -> Replacement:
        if self.strength != 1:
            raise RecipeError(f"{self.file.path}: holds {quote(key)} in full, so scale must be 1")
        return Replacement(self.file, key)

    def _product(self, match: re.Match[str], role: Role) -> Product:
        path, key = match["path"], match[0]
        into = Factor(self.file, key, transposed=True)
        if into.shape[-1] != self.config.rank(path):
            raise EditError(
                f"{self.file.path}: {quote(key)} has rank {into.shape[-1]}, {CONFIG} makes it "
                f"{self.config.rank(path)}"
            )
        out = Factor(self.file, f"{_PREFIX}{path}.{_PAIRS[match['name']]}")
        axis = input_axis(self.arch, role, self.file.path)
        return Product(out, into, self.strength * self.config.scale(path), axis)


def _live_modules(arch: Architecture) -> dict[str, Role]:
    """The path of every module, as a model with or without a head names it: the role of its weight.

    Experts are named one by one, as the file does and as PEFT did where each was a module.
    """
    return {
        f"{prefix}{fact.path.format(layer=layer, expert=expert)}": Role(
            role, layer, "weight", expert
        )
        for role, fact in arch.facts.modules.items()
        for prefix in ([""] if fact.root else arch.facts.prefixes)
        for layer in (arch.layers_of(role) if fact.per_layer else [None])
        for expert in (range(arch.sizes["experts"]) if fact.per_expert else [None])
    }


@dataclass(frozen=True)
class LoraEdit(TensorChanges):
    """y ↦ y + scale · B(A(x)) for each module of the adapter."""

    op: ClassVar[str] = "lora"
