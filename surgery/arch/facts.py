"""The shape of a family's JSON file: facts about names, sizes and layouts, and no code."""

from __future__ import annotations

import json
from importlib import resources
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class SizeFact(_Facts):
    """A size read from `config.json` under `key`, else `default`: a number, or the name of
    another size, or two of them joined by `*` or `//`."""

    key: str | None = None
    default: int | str


class TieFact(_Facts):
    """Which role's weight is the same tensor as the embedding's unless the config says otherwise.

    `bias`: the role whose tensor is also the head's bias as long as they are tied.
    """

    default: bool
    head: str
    embed: str
    bias: str | None = None


class ModuleFact(_Facts):
    """One module: where it is, how its weight lies on disk, and what it does to the stream.

    `type` fixes the axes: `linear` weights are [out, in], `conv1d` weights [in, out],
    `embedding` weights [rows, width], `norm` weights and biases [size], `bias` is a lone
    parameter. `bias` is true, false, "optional", or the config field that turns it on in every
    layer. `writes`: its output is added to the residual stream. `root`: the path starts at the
    model with its head, not at the base model.
    """

    path: str
    type: Literal["linear", "conv1d", "embedding", "norm", "bias"]
    inputs: str = Field("width", alias="in")
    out: str = "width"
    rows: str = "vocab"
    size: str = "width"
    bias: bool | str = False
    writes: bool = False
    root: bool = False
    optional: bool = False
    parts: list[str] = []

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.path

    def weight_shape(self) -> tuple[str, ...]:
        """The weight's shape in names of sizes, in stored order."""
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


class FamilyFacts(_Facts):
    """Everything the package knows about one family."""

    model_type: str
    kind: Literal["decoder", "encoder"]
    prefixes: list[str]
    tie: TieFact
    sizes: dict[str, SizeFact]
    refuse: dict[str, str]
    block: str
    norm: Literal["layer", "rms"]
    post_norm: bool
    modules: dict[str, ModuleFact]
    ignored: list[str]
    steer: dict[str, SteerFact]


def load_facts(file: str) -> FamilyFacts:
    """The facts of `families/<file>`."""
    text = resources.files("surgery.arch").joinpath("families", file).read_text("utf-8")
    return FamilyFacts.model_validate(json.loads(text))
