"""Heads and neurons that the edited checkpoint is without: what goes, and what its config says.

One config serves all layers, so each must keep as much as the others. What no config of the
family can say is refused; leaving `prune` out makes the same heads or neurons zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from surgery.addresses import Head, Neuron
from surgery.arch import Architecture, Band
from surgery.errors import EditError

WAY_OUT = "leave prune out, which makes them zero"


class Pruning(ABC):
    """What is taken out of a model."""

    @abstractmethod
    def bands(self, arch: Architecture) -> Iterator[Band]:
        """The outputs and inputs of projections that go."""

    @abstractmethod
    def config(self, arch: Architecture) -> dict[str, int]:
        """The config fields of the model that is left.

        Raises `EditError` where there is no such model of the family.
        """


@dataclass(frozen=True)
class HeadPruning(Pruning):
    """Heads go with their queries and inputs of `o_proj`; a key-value head whose heads all go
    goes with them."""

    heads: tuple[Head, ...]

    def bands(self, arch: Architecture) -> Iterator[Band]:
        left = self._left(arch)
        for head in self.heads:
            yield Band(arch.head_region(head), arch.input_axis("o_proj"))
            gone = "qkv" if arch.kv_group(head) not in left[head.layer] else "q"
            for part in gone:
                yield from arch.qkv_regions(head)[part]

    def config(self, arch: Architecture) -> dict[str, int]:
        if arch.facts.prune.heads == "never":
            raise EditError(
                f"{arch.family}: heads cannot be pruned: {arch.facts.prune.reason}; {WAY_OUT}"
            )
        heads, kv_heads = self._count(arch)
        if arch.facts.prune.heads == "divisor" and arch.width % heads:
            raise EditError(
                f"{arch.family}: {heads} heads cannot be left: {arch.facts.prune.reason}, which "
                f"is {arch.width}; prune another number of heads (whole key-value groups, say), "
                f"or {WAY_OUT}"
            )
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": arch.sizes["head_dim"]}
        return {key: size for name, size in sizes.items() for key in arch.config_keys(name)}

    def _count(self, arch: Architecture) -> tuple[int, int]:
        """How many heads and key-value heads each layer keeps."""
        kept = {layer: sorted(groups.values()) for layer, groups in self._left(arch).items()}
        first = kept[0]
        for layer, groups in kept.items():
            if len(set(groups)) != 1:
                raise EditError(
                    f"{arch.family}: layer {layer} would keep {groups} heads in its key-value "
                    f"groups; each must keep as many or go, and not all of them; or {WAY_OUT}"
                )
            if groups != first:
                raise EditError(
                    f"{arch.family}: layer 0 would keep {first} heads in its key-value groups, "
                    f"layer {layer} {groups}; every layer must lose as many; or {WAY_OUT}"
                )
        return sum(first), len(first)

    def _left(self, arch: Architecture) -> dict[int, Counter[int]]:
        """By layer: how many heads each key-value group keeps, of those that keep any."""
        gone = set(self.heads)
        every = [Head(layer, h) for layer in range(arch.layers) for h in range(arch.sizes["heads"])]
        left = {layer: Counter[int]() for layer in range(arch.layers)}
        for head in every:
            if head not in gone:
                left[head.layer][arch.kv_group(head)] += 1
        return left


@dataclass(frozen=True)
class NeuronPruning(Pruning):
    """Neurons go with their rows of `up` and `gate` and their inputs of `down_proj`."""

    neurons: tuple[Neuron, ...]

    def bands(self, arch: Architecture) -> Iterator[Band]:
        for neuron in self.neurons:
            region = arch.neuron_region(neuron)
            yield Band(region, arch.input_axis(arch.roles[region.tensor].role))
            for bands in arch.gate_up_regions(neuron).values():
                yield from bands

    def config(self, arch: Architecture) -> dict[str, int]:
        config: dict[str, int] = {}
        for name in ("mlp_width", "expert_width"):
            lost = self._lost(arch, name == "expert_width")
            if not any(lost.values()):
                continue
            keys = arch.config_keys(name)
            if not keys:
                raise EditError(
                    f"{arch.family}: neurons cannot be pruned: the config has no field for the "
                    f"width of the MLP; {WAY_OUT}"
                )
            config |= dict.fromkeys(keys, arch.sizes[name] - self._same(arch, name, lost))
        return config

    def _lost(self, arch: Architecture, sparse: bool) -> Counter[tuple[int, int | None]]:
        """By layer and expert: how many neurons go, 0 too; of MLPs or of experts."""
        counts: Counter[tuple[int, int | None]] = Counter()
        for layer in range(arch.layers):
            if (layer in arch.sparse) is sparse:
                experts = range(arch.sizes["experts"]) if sparse else (None,)
                counts.update({(layer, expert): 0 for expert in experts})
        own = (n for n in self.neurons if (n.expert is not None) is sparse)
        counts.update((n.layer, n.expert) for n in own)
        return counts

    def _same(self, arch: Architecture, name: str, lost: Counter[tuple[int, int | None]]) -> int:
        [(place, most), *_] = lost.most_common()
        for other, count in lost.items():
            if count != most or count == arch.sizes[name]:
                raise EditError(
                    f"{arch.family}: {_place(place)} would lose {most} neurons, {_place(other)} "
                    f"{count}; each must lose as many, and not all; or {WAY_OUT}"
                )
        return most


def _place(place: tuple[int, int | None]) -> str:
    layer, expert = place
    return f"layer {layer}" if expert is None else f"expert {expert} of layer {layer}"
