"""`Architecture`: which tensor of a checkpoint plays which role, and along which axes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.addresses import Head, Neuron, Region
from surgery.arch.bounds import check_head, check_neuron
from surgery.arch.facts import FamilyFacts, ModuleFact
from surgery.arch.heads import PARTS, head_rows, kv_group, part_start
from surgery.arch.naming import Naming
from surgery.arch.roles import Band, BiasSlot, Reader, Role, Writer
from surgery.arch.settings import Settings
from surgery.arch.sizes import evaluate

MLP_INPUTS = ("gate_proj", "gate_up_proj", "up_proj")


@dataclass(frozen=True)
class Architecture:
    """A checkpoint's tensors mapped to roles.

    `sizes` holds layers, width, heads, kv_heads, head_dim, mlp_width, vocab, positions and
    what follows from them; `roles` maps every stored tensor; `naming` is how this file spells
    names; `tied`: the head is the embedding; `sparse` are the layers with experts.
    """

    facts: FamilyFacts
    settings: Settings
    sizes: Mapping[str, int]
    roles: Mapping[str, Role]
    naming: Naming
    tied: bool
    sparse: frozenset[int] = frozenset()

    @property
    def family(self) -> str:
        return self.facts.model_type

    @property
    def layers(self) -> int:
        return self.sizes["layers"]

    @property
    def width(self) -> int:
        return self.sizes["width"]

    @property
    def prefix(self) -> str:
        """What this file puts before the base model's names."""
        return self.naming.prefix

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of each query and key are rotated; 0 without rotary embedding."""
        if self.facts.positions != "rotary":
            return 0
        rotary = self.facts.rotary
        found = [self.settings.get(key) for key in rotary.keys]
        fraction = next((value for value in found if value is not None), rotary.fraction)
        return int(evaluate(rotary.dims, self.sizes) * fraction)

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised before they meet."""
        return "q_norm" in self.facts.modules

    @property
    def qkv_clip(self) -> bool:
        """Whether queries, keys and values are clamped to a bound."""
        return self.facts.clip is not None and bool(self.settings.get(self.facts.clip))

    @property
    def activation(self) -> str:
        """The MLP's activation, as transformers calls it."""
        fact = self.facts.activation
        named = (fact.key and self.settings.get(fact.key)) or fact.default
        return fact.means.get(named, named)

    @property
    def mlp_inputs(self) -> tuple[str, ...]:
        """The roles of the projections that enter an MLP, the one before the activation first;
        none where there are only experts."""
        return tuple(role for role in MLP_INPUTS if role in self.facts.modules)

    def name(
        self,
        role: str,
        layer: int | None = None,
        kind: str = "weight",
        expert: int | None = None,
    ) -> str:
        """The on-disk name that (role, layer, kind, expert) has in this file, stored or not."""
        return self.naming.tensor(self.facts.modules[role], layer, kind, expert)

    def shape(self, role: str, kind: str = "weight") -> tuple[int, ...]:
        """The stored shape of a role's weight or bias."""
        names = self.facts.modules[role].shape(kind)
        return tuple(evaluate(name, self.sizes) for name in names)

    def config_keys(self, size: str) -> tuple[str, ...]:
        """The fields of `config.json` that give a size: those that are there, or the first there
        can be; none where the size follows from others."""
        fact = self.facts.sizes[size]
        if not fact.keys and fact.default in self.facts.sizes:
            return self.config_keys(str(fact.default))
        there = [key for key in fact.keys if key in self.settings.config]
        return tuple(there or fact.keys[:1])

    def growth(self, wide: Architecture) -> Iterator[tuple[str, int, int]]:
        """Each tensor that is longer in `wide`, along which axis, and by how much."""
        for tensor, role in self.roles.items():
            for axis, name in enumerate(self.facts.modules[role.role].shape(role.kind)):
                by = evaluate(name, wide.sizes) - evaluate(name, self.sizes) if name != "any" else 0
                if by:
                    yield tensor, axis, by

    def layers_of(self, role: str) -> tuple[int, ...]:
        """The layers that have `role`: all, or those with or without experts."""
        return layers_of(self.facts.modules[role], self.layers, self.sparse)

    def input_axis(self, role: str) -> int:
        """The axis of a projection's stored weight that its input runs along."""
        return {"linear": 1, "conv1d": 0}[self.facts.modules[role].type]

    def kv_group(self, head: Head) -> int:
        """The key-value head that `head` reads, which others may share."""
        return kv_group(head.head, self.sizes)

    def head_region(self, head: Head) -> Region:
        """The part of `o_proj` that reads head `head` of z: columns of a Linear, rows of a Conv1D.

        Raises `EditError` for a head this model does not have.
        """
        check_head(head, self.family, self.sizes)
        dim = self.sizes["head_dim"]
        columns = range(head.head * dim, (head.head + 1) * dim)
        return self._region(
            Role("o_proj", head.layer, "weight"), self.input_axis("o_proj"), columns
        )

    def qkv_regions(self, head: Head) -> dict[str, tuple[Band, ...]]:
        """Where the queries (`q`) of a head, and the keys (`k`) and values (`v`) it reads, are
        computed: for each, its rows of the weight and, where stored, its elements of the bias.

        Under grouped-query attention other heads read the same keys and values. Raises
        `EditError` for a head this model does not have.
        """
        check_head(head, self.family, self.sizes)
        regions = {}
        for part in PARTS:
            role = self._holder(part)
            rows = head_rows(self.facts.modules[role], part, head.head, self.sizes)
            regions[part] = self._outputs(role, head.layer, None, rows)
        return regions

    def neuron_region(self, neuron: Neuron) -> Region:
        """The part of `down_proj` that reads one MLP neuron; raises `EditError` if it has none."""
        check_neuron(neuron, self.family, self.sizes, self.sparse)
        role = Role(_in_expert("down_proj", neuron), neuron.layer, "weight", neuron.expert)
        index = range(neuron.neuron, neuron.neuron + 1)
        return self._region(role, self.input_axis(role.role), index)

    def gate_up_regions(self, neuron: Neuron) -> dict[str, tuple[Band, ...]]:
        """Where a neuron is computed: its row of the weight, and its bias where stored, of `up`
        and, in a gated MLP, of `gate`. Raises `EditError` for a neuron this model does not have.
        """
        check_neuron(neuron, self.family, self.sizes, self.sparse)
        regions = {}
        for part in ("gate", "up"):
            role = self._holder(part, _in_expert("", neuron))
            if role in self.facts.modules:
                start = part_start(self.facts.modules[role], part, self.sizes) + neuron.neuron
                rows = range(start, start + 1)
                regions[part] = self._outputs(role, neuron.layer, neuron.expert, rows)
        return regions

    def writers(self, layers: Iterable[int], outside_blocks: bool) -> Iterator[Writer]:
        """Every stored tensor that writes to the residual stream in `layers`.

        With `outside_blocks`, the embeddings too. Output biases are writers as well.
        """
        for tensor, role, module in self._stored(layers, outside_blocks):
            if module.writes:
                # The residual axis is the output: the last one, but for a Linear's weight.
                first = role.kind == "bias" or module.type == "linear"
                yield Writer(tensor, 0 if first else 1, module.norm)

    def readers(self, layers: Iterable[int], outside_blocks: bool) -> Iterator[Reader]:
        """Every stored matrix that reads the residual stream in `layers`.

        With `outside_blocks`, the output head too, but not where it is the embedding.
        """
        for tensor, role, module in self._stored(layers, outside_blocks):
            if module.reads and role.kind == "weight":
                yield Reader(tensor, self.input_axis(role.role), module.norm)

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
                for layer in self.layers_of(role):
                    yield self.name(role, layer, "bias"), self.shape(role, "bias")

    def module(self, model: Any, role: str, layer: int | None = None) -> Any:
        """The live `torch.nn.Module` of a role in a transformers `model`.

        transformers keeps the experts of a layer in one module, which this is for any of theirs.
        """
        fact = self.facts.modules[role]
        path = fact.live.path if fact.live else fact.path
        base = model if fact.root else model.base_model
        return base.get_submodule(path.format(layer=layer))

    def holder(self, model: Any, tensor: str) -> tuple[Any, str]:
        """The live module and the name in it of the parameter that the stored `tensor` is in."""
        role = self.roles[tensor]
        live = self.facts.modules[role.role].live
        named = live.parameter if live and role.kind == "weight" else role.kind
        return self.module(model, role.role, role.layer), named

    def parameter(self, model: Any, tensor: str) -> Any:
        """The live `torch.Tensor` that holds the stored `tensor` in a transformers `model`: a
        parameter, or the view of one that holds several tensors of the file."""
        role = self.roles[tensor]
        live = self.facts.modules[role.role].live
        found = getattr(*self.holder(model, tensor))
        found = found if role.expert is None else found[role.expert]
        return found.chunk(live.part[1])[live.part[0]] if live and live.part else found

    def block(self, model: Any, layer: int) -> Any:
        """The live transformer block `layer` of a transformers `model`."""
        return model.base_model.get_submodule(self.facts.block.format(layer=layer))

    def _stored(
        self, layers: Iterable[int], outside_blocks: bool
    ) -> Iterator[tuple[str, Role, ModuleFact]]:
        chosen = set(layers)
        for tensor, role in self.roles.items():
            if outside_blocks if role.layer is None else role.layer in chosen:
                yield tensor, role, self.facts.modules[role.role]

    def _holder(self, part: str, prefix: str = "") -> str:
        """The role of the projection that computes `part`, by itself or fused with others."""
        for role, module in self.facts.modules.items():
            if part in module.parts and role.startswith(prefix):
                return role
        return f"{prefix}{part}_proj"

    def _outputs(self, role: str, layer: int, expert: int | None, rows: range) -> tuple[Band, ...]:
        axes = {"weight": 1 - self.input_axis(role), "bias": 0}
        places = {kind: Role(role, layer, kind, expert) for kind in axes}
        return tuple(
            Band(self._region(place, axes[kind], rows), axes[kind])
            for kind, place in places.items()
            if self._name(place) in self.roles
        )

    def _region(self, role: Role, axis: int, rows: range) -> Region:
        shape = self.shape(role.role, role.kind)
        return Region.band(self._name(role), shape, axis, rows.start, rows.stop)

    def _name(self, role: Role) -> str:
        return self.name(role.role, role.layer, role.kind, role.expert)


def layers_of(module: ModuleFact, layers: int, sparse: frozenset[int]) -> tuple[int, ...]:
    """The layers that have `module`, of `layers` in all, of which `sparse` have experts."""
    kinds = {"all": (True, False), "dense": (False,), "sparse": (True,)}[module.blocks]
    return tuple(layer for layer in range(layers) if (layer in sparse) in kinds)


def _in_expert(role: str, neuron: Neuron) -> str:
    return role if neuron.expert is None else f"expert_{role}"
