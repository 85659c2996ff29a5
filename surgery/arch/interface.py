"""`Architecture`: which tensor of a checkpoint plays which role, and along which axes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.addresses import Head, Neuron, Region
from surgery.arch.facts import FamilyFacts, ModuleFact
from surgery.errors import ArchitectureError, EditError, quote


@dataclass(frozen=True)
class Role:
    """What one stored tensor is: `kind` is `weight` or `bias`; `layer` is None outside blocks."""

    role: str
    layer: int | None
    kind: str

    def __str__(self) -> str:
        layer = "" if self.layer is None else f".{self.layer}"
        return f"{self.role}{layer}.{self.kind}"


@dataclass(frozen=True)
class Writer:
    """A tensor that writes to the residual stream; `axis` is the one of residual width."""

    tensor: str
    axis: int


@dataclass(frozen=True)
class BiasSlot:
    """Where a bias is or, with `config_key`, would be once the config turns it on."""

    tensor: str
    config_key: str | None = None


@dataclass(frozen=True)
class Architecture:
    """A checkpoint's tensors mapped to roles.

    `sizes` holds layers, width, heads, kv_heads, head_dim, mlp_width, vocab, positions and
    what follows from them; `roles` maps every stored tensor; `prefix` is what this file puts
    before the base model's names; `tied`: the head is the embedding.
    """

    facts: FamilyFacts
    sizes: Mapping[str, int]
    roles: Mapping[str, Role]
    prefix: str
    tied: bool

    @property
    def family(self) -> str:
        return self.facts.model_type

    @property
    def layers(self) -> int:
        return self.sizes["layers"]

    @property
    def width(self) -> int:
        return self.sizes["width"]

    def name(self, role: str, layer: int | None = None, kind: str = "weight") -> str:
        """The on-disk name that (role, layer, kind) has in this file, stored or not."""
        return tensor_name(self.facts.modules[role], self.prefix, layer, kind)

    def shape(self, role: str, kind: str = "weight") -> tuple[int, ...]:
        """The stored shape of a role's weight or bias."""
        module = self.facts.modules[role]
        names = module.weight_shape() if kind == "weight" else module.bias_shape()
        return tuple(evaluate(name, self.sizes) for name in names)

    def input_axis(self, role: str) -> int:
        """The axis of a projection's stored weight that its input runs along."""
        return {"linear": 1, "conv1d": 0}[self.facts.modules[role].type]

    def head_region(self, head: Head) -> Region:
        """The part of `o_proj` that reads head `head` of z: columns of a Linear, rows of a Conv1D.

        Raises `EditError` for a head this model does not have.
        """
        self._check("head", str(head), head.layer, head.head, self.sizes["heads"])
        dim = self.sizes["head_dim"]
        return self._input_band("o_proj", head.layer, head.head * dim, (head.head + 1) * dim)

    def neuron_region(self, neuron: Neuron) -> Region:
        """The part of `down_proj` that reads one MLP neuron; raises `EditError` if it has none."""
        self._check("neuron", str(neuron), neuron.layer, neuron.neuron, self.sizes["mlp_width"])
        return self._input_band("down_proj", neuron.layer, neuron.neuron, neuron.neuron + 1)

    def writers(self, layers: Iterable[int], outside_blocks: bool) -> Iterator[Writer]:
        """Every stored tensor that writes to the residual stream in `layers`.

        With `outside_blocks`, the embeddings too. Output biases are writers as well.
        """
        chosen = set(layers)
        for tensor, role in self.roles.items():
            module = self.facts.modules[role.role]
            wanted = outside_blocks if role.layer is None else role.layer in chosen
            if module.writes and wanted:
                # The residual axis is the output: the last one, but for a Linear's weight.
                first = role.kind == "bias" or module.type == "linear"
                yield Writer(tensor, 0 if first else 1)

    def bias_slot(self, role: str, layer: int | None) -> BiasSlot | None:
        """Where the bias of `role` is stored or could be; None where the family has no slot."""
        bias = self.facts.modules[role].bias
        tensor = self.name(role, layer, "bias")
        if tensor in self.roles:
            return BiasSlot(tensor)
        return BiasSlot(tensor, bias) if isinstance(bias, str) and bias != "optional" else None

    def flagged_biases(self, config_key: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every bias that config field `config_key` turns on, in all layers."""
        for role, module in self.facts.modules.items():
            if module.bias == config_key:
                for layer in range(self.layers):
                    yield self.name(role, layer, "bias"), self.shape(role, "bias")

    def module(self, model: Any, role: str, layer: int | None = None) -> Any:
        """The live `torch.nn.Module` of a role in a transformers `model`."""
        fact = self.facts.modules[role]
        base = model if fact.root else model.base_model
        return base.get_submodule(fact.path.format(layer=layer))

    def block(self, model: Any, layer: int) -> Any:
        """The live transformer block `layer` of a transformers `model`."""
        return model.base_model.get_submodule(self.facts.block.format(layer=layer))

    def _input_band(self, role: str, layer: int, start: int, stop: int) -> Region:
        axis = self.input_axis(role)
        return Region.band(self.name(role, layer), self.shape(role), axis, start, stop)

    def _check(self, noun: str, address: str, layer: int, index: int, count: int) -> None:
        if layer >= self.layers:
            raise EditError(
                f"{address}: layer {layer} is out of range; this {self.family} model has layers "
                f"0 to {self.layers - 1}"
            )
        if index >= count:
            raise EditError(
                f"{address}: {noun} {index} is out of range; this {self.family} model has {noun}s "
                f"0 to {count - 1} in each layer"
            )


def tensor_name(module: ModuleFact, prefix: str, layer: int | None, kind: str) -> str:
    """The name under which a module's weight or bias is stored."""
    path = module.path.format(layer=layer)
    return f"{'' if module.root else prefix}{path}.{'bias' if module.type == 'bias' else kind}"


def evaluate(expression: int | str, sizes: Mapping[str, int]) -> int:
    """A size as family files write it: a number, a size's name, or two joined by `*` or `//`."""
    if isinstance(expression, int) or expression.isdigit():
        return int(expression)
    match = re.fullmatch(r"(\w+)(\*|//)(\w+)", expression)
    if match is None:
        return sizes[expression]
    left, right = evaluate(match[1], sizes), evaluate(match[3], sizes)
    if match[2] == "//" and right == 0:
        raise ArchitectureError(f"config.json: {match[3]} is 0; expected a positive number")
    return left * right if match[2] == "*" else left // right


def describe(names: Iterable[str], limit: int = 3) -> str:
    """The first few of `names`, escaped, for a message."""
    listed = list(names)
    shown = ", ".join(quote(name) for name in listed[:limit])
    return shown if len(listed) <= limit else f"{shown} and {len(listed) - limit} more"
