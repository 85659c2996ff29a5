"""`neurons`: scale MLP neurons where the down projection reads them (arXiv 2505.16538).

The factor applies after the activation: column n of a Linear `down_proj`, row n of a Conv1D. In
a layer with experts a neuron is one of one expert, and only what is routed there changes.

With `mean`, m_n ↦ mean_n + factor·(m_n − mean_n): the bias of `down_proj` gains
(1 − factor)·W_down[:, n]·mean_n, all neurons of a layer in one sum (mean ablation at factor 0).
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
from surgery.edits.interface import Fields, RecipeFiles
from surgery.edits.scale import InputScaling
from surgery.edits.selection import select
from surgery.errors import EditError


class NeuronsFields(Fields):
    """`{op: neurons, neurons: [L3N17], factor: 0.0}`, or `file: neurons.csv` with `top`.

    `mean: {file: means.safetensors, key: mean}` is a tensor [layers, neurons].
    """

    op: Literal["neurons"]
    neurons: list[str] | None = None
    file: str | None = None
    top: PositiveInt | None = None
    factor: float = 0.0
    mean: MeanSource | None = None

    def build(self, arch: Architecture, files: RecipeFiles) -> NeuronsEdit:
        chosen = select(
            ("layer", "neuron"), self.neurons, self.file, self.top, files, parse_neuron, Neuron
        )
        for neuron in chosen:
            arch.neuron_region(neuron)
        mean = None if self.mean is None else self._means(self.mean, arch, files, chosen)
        edit = NeuronsEdit(neurons=chosen, factor=self.factor, mean=mean)
        edit.shift.slots(arch)
        return edit

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
            return output + (self.factor - 1) * _written(module, inputs, expert, neurons)

        handle: AbstractContextManager[Any]
        if expert is None:
            down = arch.module(model, "down_proj", layer)
            handle = down.register_forward_pre_hook(change_neurons)
        else:
            experts = arch.module(model, "expert_down_proj", layer)
            handle = experts.register_forward_hook(scale_expert)
        return handle


def _written(experts: Any, inputs: tuple[Any, ...], expert: int | None, neurons: list[int]) -> Any:
    """What `neurons` of one expert add to the output of a layer's experts [tokens, width].

    transformers computes all experts of a layer in one module, from their stacked weights and the
    router's choice; `inputs` are its x [tokens, width], indices and weights [tokens, chosen].
    """
    import torch

    x, index, weight = inputs
    gate, up = (rows[neurons] for rows in experts.gate_up_proj[expert].chunk(2))
    activations = experts.act_fn(x @ gate.T) * (x @ up.T)
    routed = torch.where(index == expert, weight, 0).sum(-1, keepdim=True)
    return (routed * activations) @ experts.down_proj[expert][:, neurons].T
