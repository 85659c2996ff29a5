"""The shape of a family's JSON file: facts about names, sizes and layouts, and no code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from surgery.arch.settings import Condition, Settings, Value


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class SizeFact(_Facts):
    """A size: the field of `config.json` named by the first of `keys` that is there, else
    `default`, an expression in the sizes before it (see `sizes.evaluate`).

    `null` is what an explicit null means, where not the default; `least` the smallest value.
    """

    keys: list[str] = []
    default: int | str
    null: int | str | None = None
    least: int = 1


class TieFact(_Facts):
    """Which role's weight is the same tensor as the embedding's unless the config says otherwise.

    `bias`: the role whose tensor is also the head's bias as long as they are tied.
    """

    default: bool
    head: str
    embed: str
    bias: str | None = None


class LiveFact(_Facts):
    """Where transformers keeps a module in memory, if not under its name in the file.

    `parameter` holds the weight; of a tensor with `part` [i, n] it is the i-th of n equal parts
    along the first axis. The first axis of a stack of experts is the expert.
    """

    path: str
    parameter: str = "weight"
    part: tuple[int, int] | None = Field(None, strict=False)


class ModuleFact(_Facts):
    """One module: where it is, how its weight lies on disk, and what it does to the stream.

    `path` has a `{layer}` inside blocks and an `{expert}` where each expert has one. `type` fixes
    the axes: `linear` weights are [out, in], `conv1d` weights [in, out], `embedding` weights
    [rows, width], `norm` weights and biases [size], `bias` is a lone parameter. `bias` is true,
    false, "optional", or the config field that turns it on in every layer.

    `reads`: its input is the residual stream; `writes`: its output is added to it; `norm` is the
    role of the norm between the matrix and the stream, if there is one. A fused projection names
    its `parts` in order, each with its size, and how they lie along the output in `layout` (see
    `heads`). `root`: the path starts at the model with its head, not at the base model. `blocks`:
    in which blocks it is, where dense and sparse ones alternate.
    """

    path: str
    type: Literal["linear", "conv1d", "embedding", "norm", "bias"]
    inputs: str = Field("width", alias="in")
    out: str = "width"
    rows: str = "vocab"
    size: str = "width"
    bias: bool | str = False
    reads: bool = False
    writes: bool = False
    norm: str | None = None
    root: bool = False
    optional: bool = False
    parts: dict[str, str] = {}
    layout: Literal["blocks", "groups"] = "blocks"
    blocks: Literal["all", "dense", "sparse"] = "all"
    live: LiveFact | None = None

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.path

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.path

    def shape(self, kind: str) -> tuple[str, ...]:
        """The shape of the weight or the bias in expressions of sizes, in stored order."""
        return self.weight_shape() if kind == "weight" else self.bias_shape()

    def weight_shape(self) -> tuple[str, ...]:
        """The weight's shape in expressions of sizes, in stored order."""
        return {
            "linear": (self.out, self.inputs),
            "conv1d": (self.inputs, self.out),
            "embedding": (self.rows, "width"),
            "norm": (self.size,),
            "bias": (self.size,),
        }[self.type]

    def bias_shape(self) -> tuple[str, ...]:
        return (self.size,) if self.type in ("norm", "bias") else (self.out,)


class SteerFact(_Facts):
    """Where a vector added at a hook point can live: the bias of `role`.

    `layer` shifts the layer (a block's input is the output of the one before; `first` names the
    role that serves block 0); `through`: the vector first passes this role's weight.
    """

    role: str
    layer: int = 0
    first: str | None = None
    through: str | None = None


class RefuseFact(_Facts):
    """A variant that is not described: configs that match `when` are refused with `reason`."""

    when: Condition
    reason: str


class RotaryFact(_Facts):
    """How many dimensions of a head are rotated: `dims`, an expression in sizes, times the
    fraction in the first of the config fields `keys` that is there, else `fraction`."""

    dims: str = "head_dim"
    keys: list[str] = []
    fraction: float = 1.0


class ActivationFact(_Facts):
    """The MLP's activation: the config field `key`, where there is one, else `default`.

    `means` maps a legacy name to what transformers computes for it.
    """

    key: str | None = None
    default: str
    means: dict[str, str] = {}


class ExpertsFact(_Facts):
    """Which blocks have experts: every `step`-th (a config field), from the first whose number
    counted from 1 is a multiple of it, but for the layers listed in config field `dense`."""

    step: str | None = None
    dense: str | None = None


class PruneFact(_Facts):
    """Whether a config of the family can say that heads were removed.

    `free`: any number of heads beside an explicit head_dim; `divisor`: the config class insists
    that the number of heads divides the width; `never`: the head's size follows from the width
    and the number of heads, so no config describes fewer heads of the same size.
    """

    heads: Literal["free", "divisor", "never"]
    reason: str


class FamilyFacts(_Facts):
    """Everything the package knows about one family, as one config of it has it.

    `defaults` are config fields that facts consult and files may leave out, by their dotted path.
    `norms` lie before attention and MLP (`pre`), after what they add (`post`), or `both`.
    `norm_offset` is added to a norm's weight before it scales. `parallel`: attention and MLP read
    the same stream. `clip` is the config field that, where set, bounds queries, keys and values.
    `aliases` maps how old files call a norm's parameters to their names.
    """

    model_type: str
    kind: Literal["decoder", "encoder"]
    prefixes: list[str]
    tie: TieFact
    defaults: dict[str, Value | list[int] | None] = {}
    sizes: dict[str, SizeFact]
    refuse: list[RefuseFact] = []
    block: str
    norm: Literal["layer", "rms"]
    norms: Literal["pre", "post", "both"]
    norm_offset: int = 0
    parallel: bool = False
    clip: str | None = None
    positions: Literal["learned", "rotary", "alibi"]
    rotary: RotaryFact = RotaryFact()
    scaled_embedding: bool = False
    activation: ActivationFact
    experts: ExpertsFact | None = None
    prune: PruneFact
    modules: dict[str, ModuleFact]
    ignored: list[str] = []
    aliases: dict[str, str] = {}
    steer: dict[str, SteerFact] = {}


class VariantFact(_Facts):
    """For configs that match `when`, `patch` is merged into the family's document (RFC 7386: null
    removes an entry)."""

    when: Condition
    patch: dict[str, Any]


def load_facts(file: str, config: Mapping[str, Any]) -> FamilyFacts:
    """The facts of `families/<file>`, in the variant that `config` chooses."""
    text = resources.files("surgery.arch").joinpath("families", file).read_text("utf-8")
    document = json.loads(text)
    settings = Settings(config, document.get("defaults", {}))
    for variant in map(VariantFact.model_validate, document.pop("variants", [])):
        if settings.matches(variant.when):
            document = _merge(document, variant.patch)
    return FamilyFacts.model_validate(document)


def _merge(document: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    merged = dict(document)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            merged[key] = _merge(merged.get(key, {}), value)
        else:
            merged[key] = value
    return merged
