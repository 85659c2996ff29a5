"""`neurons`: scale MLP neurons where the down projection reads them (arXiv 2505.16538).

The factor applies after the activation: column n of a Linear `down_proj`, row n of a Conv1D.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from surgery.addresses import Neuron, Region, parse_neuron
from surgery.arch import Architecture
from surgery.checkpoint import TensorInfo
from surgery.edits.interface import Array, Edit, Fields, RecipeFiles, Target
from surgery.edits.scale import scale
from surgery.edits.selection import select


class NeuronsFields(Fields):
    """`{op: neurons, neurons: [L3N17], factor: 0.0}`, or `file: neurons.csv` with `top`."""

    op: Literal["neurons"]
    neurons: list[str] | None = None
    file: str | None = None
    top: PositiveInt | None = None
    factor: float = 0.0

    def build(self, arch: Architecture, files: RecipeFiles) -> NeuronsEdit:
        chosen = select(
            ("layer", "neuron"), self.neurons, self.file, self.top, files, parse_neuron, Neuron
        )
        return NeuronsEdit(chosen, self.factor)


@dataclass(frozen=True)
class NeuronsEdit(Edit):
    """m_n ↦ factor · m_n for each neuron, m the input of the down projection."""

    op: ClassVar[str] = "neurons"
    neurons: tuple[Neuron, ...]
    factor: float

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        return tuple(Target(arch.neuron_region(neuron), "input") for neuron in self.neurons)

    def transform(self, slab: Array, where: Region, state: None) -> Array:
        return scale(slab, self.factor)

    @contextmanager
    def hook(self, model: Any, arch: Architecture, state: None) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in sorted({neuron.layer for neuron in self.neurons}):
                chosen = [n.neuron for n in self.neurons if n.layer == layer]
                stack.enter_context(self._hook_layer(model, arch, layer, chosen))
            yield

    def _hook_layer(
        self, model: Any, arch: Architecture, layer: int, neurons: list[int]
    ) -> AbstractContextManager[Any]:
        def scale_neurons(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            activations = inputs[0].clone()
            activations[..., neurons] *= self.factor
            return (activations, *inputs[1:])

        handle: AbstractContextManager[Any] = arch.module(
            model, "down_proj", layer
        ).register_forward_pre_hook(scale_neurons)
        return handle
