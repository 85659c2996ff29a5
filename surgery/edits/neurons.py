"""`neurons`: scale MLP neurons where the down projection reads them (arXiv 2505.16538).

The factor applies after the activation: column n of a Linear `down_proj`, row n of a Conv1D. In
a layer with experts a neuron is one of one expert, and only what is routed there changes.

With `mean`, m_n ↦ mean_n + factor·(m_n − mean_n): the bias of `down_proj` gains
(1 − factor)·W_down[:, n]·mean_n, all neurons of a layer in one sum (mean ablation at factor 0).

With `prune`, neurons that became zero are left out of the checkpoint: see `pruning`.

With `auroc`, neurons are scaled before the activation instead: see `dampening`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from surgery.addresses import Neuron, Region, parse_neuron
from surgery.arch import Architecture
from surgery.edits.biases import MeanSource, Vectors
from surgery.edits.dampening import AurocSource, DampenedNeurons, Method, Part, dampened
from surgery.edits.experts import written
from surgery.edits.interface import Edit, Fields, RecipeFiles
from surgery.edits.pruning import NeuronPruning
from surgery.edits.scale import InputScaling
from surgery.edits.selection import select
from surgery.errors import EditError, RecipeError


class NeuronsFields(Fields):
    """`{op: neurons, neurons: [L3N17], factor: 0.0}`, or `file: neurons.csv` with `top`.

    `mean: {file: means.safetensors, key: mean}` is a tensor [layers, neurons]. With
    `auroc: {file: auroc.csv}`, of which `top` takes the highest, `method` is `aura`, `det0`, or
    `damp` with its `factor`, and `on` says which projection of a gated MLP, `gate` or `up`. With
    `prune: true` neurons of factor 0 are left out, and the config counts fewer.
    """

    op: Literal["neurons"]
    neurons: list[str] | None = None
    file: str | None = None
    top: PositiveInt | None = None
    factor: float = 0.0
    mean: MeanSource | None = None
    auroc: AurocSource | None = None
    method: Method | None = None
    on: Part | None = None
    prune: bool = False

    def build(self, arch: Architecture, files: RecipeFiles) -> Edit:
        if self.auroc is not None:
            return self._dampened(self.auroc, arch, files)
        if self.method is not None or self.on is not None:
            raise RecipeError("method and on go with auroc")
        chosen = select(
            ("layer", "neuron"), self.neurons, self.file, self.top, files, parse_neuron, Neuron
        )
        for neuron in chosen:
            arch.neuron_region(neuron)
        mean = None if self.mean is None else self._means(self.mean, arch, files, chosen)
        pruning = NeuronPruning(chosen) if self.prune else None
        edit = NeuronsEdit(neurons=chosen, factor=self.factor, mean=mean, pruning=pruning)
        edit.check(arch)
        return edit

    def _dampened(
        self, auroc: AurocSource, arch: Architecture, files: RecipeFiles
    ) -> DampenedNeurons:
        if self.neurons is not None or self.file is not None or self.mean or self.prune:
            raise RecipeError("auroc goes with top, method, factor and on, and nothing else")
        if self.method is None or (self.method == "damp") is not (
            "factor" in self.model_fields_set
        ):
            raise RecipeError(
                "say method: aura, det0 or damp; a factor goes with damp, and only it"
            )
        experts = auroc.experts(arch, files, self.top)
        return dampened(arch, experts, self.method, self.factor, self.on)

    def _means(
        self, mean: MeanSource, arch: Architecture, files: RecipeFiles, chosen: tuple[Neuron, ...]
    ) -> Vectors:
        if any(neuron.expert is not None for neuron in chosen):
            raise EditError(
                f"{arch.family}: what an expert adds depends on the router, so no bias can hold "
                "the mean of a neuron of one; leave mean out, which makes it zero"
            )
        return mean.read(files, (arch.layers, arch.sizes["mlp_width"]))


@dataclass(frozen=True, kw_only=True)
class NeuronsEdit(InputScaling):
    """m_n ↦ mean_n + factor · (m_n − mean_n) for each neuron, m the input of the down projection;
    `mean` is float64 [layers, neurons]."""

    op: ClassVar[str] = "neurons"
    role: ClassVar[str] = "down_proj"
    neurons: tuple[Neuron, ...]

    def regions(self, arch: Architecture) -> tuple[Region, ...]:
        return tuple(map(arch.neuron_region, self.neurons))

    def places(self) -> Iterator[tuple[int, int]]:
        return ((neuron.layer, neuron.neuron) for neuron in self.neurons)

    @contextmanager
    def hook(self, model: Any, arch: Architecture, state: Any) -> Iterator[None]:
        chosen: dict[tuple[int, int | None], list[int]] = {}
        for neuron in self.neurons:
            chosen.setdefault((neuron.layer, neuron.expert), []).append(neuron.neuron)
        with ExitStack() as stack:
            for (layer, expert), neurons in chosen.items():
                stack.enter_context(self._hook(model, arch, layer, expert, neurons))
            yield

    def _hook(
        self, model: Any, arch: Architecture, layer: int, expert: int | None, neurons: list[int]
    ) -> AbstractContextManager[Any]:
        def change_neurons(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            activations = inputs[0].clone()
            activations[..., neurons] = self.changed(activations[..., neurons], layer, neurons)
            return (activations, *inputs[1:])

        def scale_expert(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            return output + (self.factor - 1) * written(module, inputs, expert, neurons)

        handle: AbstractContextManager[Any]
        if expert is None:
            down = arch.module(model, "down_proj", layer)
            handle = down.register_forward_pre_hook(change_neurons)
        else:
            experts = arch.module(model, "expert_down_proj", layer)
            handle = experts.register_forward_hook(scale_expert)
        return handle
