"""Neurons scaled before their activation, by how well they tell one kind of text from another.

AurA (Suau et al., "Whispering Experts", ICML 2024): the output of a linear layer with area under
the ROC curve above ½ is an expert, and is multiplied by α = 1 − 2(AUROC − ½). Det0 is α = 0, Damp
one α for all experts. As weights: the row that computes the output, and its bias.

The paper counts the output of every linear layer of an MLP as a neuron. A gated MLP has two before
its product, so which of them was scored must be said; the down projection's are not offered here,
being coordinates of the residual stream and no neurons of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from surgery.addresses import Neuron, Region, runs
from surgery.arch import Architecture
from surgery.checkpoint import TensorInfo
from surgery.edits.experts import written
from surgery.edits.interface import Array, Edit, Reader, RecipeFiles, Target
from surgery.edits.selection import best, read_scores
from surgery.errors import EditError, RecipeError

Method = Literal["aura", "det0", "damp"]
Part = Literal["gate", "up"]


class AurocSource(BaseModel):
    """A CSV `layer,neuron,auroc`; of a model with experts `layer,expert,neuron,auroc`, where
    the expert is 0 in layers that have none."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    file: str

    def experts(
        self, arch: Architecture, files: RecipeFiles, top: int | None
    ) -> dict[Neuron, float]:
        """AUROC of each neuron that has one above ½, of the `top` highest where that is given.

        Raises `RecipeError` for a malformed file, a neuron named twice, and where none is left.
        """
        path = files.path(self.file)
        columns = ("layer", "expert", "neuron") if arch.sparse else ("layer", "neuron")
        rows = read_scores(path, columns, "auroc")
        neurons = [_neuron(arch, *indices) for indices, _ in rows]
        if len(set(neurons)) != len(neurons):
            raise RecipeError(f"{path}: names a neuron twice")
        if any(not 0 <= score <= 1 for _, score in rows):
            raise RecipeError(f"{path}: an auroc is outside 0 to 1")
        ranked = best([(indices, score) for indices, score in rows if score > 0.5], top)
        if not ranked:
            raise RecipeError(f"{path}: no neuron has an auroc above 0.5, so none is an expert")
        return {_neuron(arch, *indices): score for indices, score in ranked}


def _neuron(arch: Architecture, layer: int, *rest: int) -> Neuron:
    """The neuron of a row: a layer of this model without experts has but expert 0."""
    *expert, neuron = rest
    if expert == [0] and layer not in arch.sparse:
        expert = []
    return Neuron(layer, neuron, *expert)


def dampened(
    arch: Architecture,
    experts: Mapping[Neuron, float],
    method: Method,
    factor: float,
    on: Part | None,
) -> DampenedNeurons:
    """The edit that scales `experts`, given with their AUROC; `factor` is the α of damp."""
    parts = {part for neuron in experts for part in arch.gate_up_regions(neuron)}
    if "gate" in parts and on is None:
        raise EditError(
            f"{arch.family} has a gated MLP, in which a neuron has two outputs before the product: "
            "say on: gate or on: up, whichever was scored"
        )
    if on is not None and on not in parts:
        raise EditError(f"{arch.family} has no gate in its MLP; leave on out")
    constant = {"det0": 0.0, "damp": factor}
    factors = {n: constant.get(method, 1 - 2 * (auroc - 0.5)) for n, auroc in experts.items()}
    return DampenedNeurons(factors, on or "up")


@dataclass(frozen=True)
class DampenedNeurons(Edit):
    """y_n ↦ factors[n] · y_n for outputs y of the projection `part`, before the activation."""

    op: ClassVar[str] = "neurons"
    neurons: Mapping[Neuron, float]
    part: Part

    def _lines(self, arch: Architecture) -> dict[str, tuple[int, dict[int, float]]]:
        """By tensor: the axis its outputs lie along, and the factor of each that is scaled."""
        lines: dict[str, tuple[int, dict[int, float]]] = {}
        for neuron, factor in self.neurons.items():
            for band in arch.gate_up_regions(neuron)[self.part]:
                _, factors = lines.setdefault(band.region.tensor, (band.axis, {}))
                factors[band.region.start[band.axis]] = factor
        return lines

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        return tuple(
            Target(Region.band(tensor, tensors[tensor].shape, axis, *run), "output")
            for tensor, (axis, factors) in self._lines(arch).items()
            for run in runs(factors)
        )

    def prepare(
        self, arch: Architecture, reader: Reader
    ) -> dict[str, tuple[int, NDArray[np.float64]]]:
        """By tensor: the axis, and the factor of every output from the first to the last scaled."""
        state = {}
        for tensor, (axis, factors) in self._lines(arch).items():
            table = np.ones(max(factors) + 1)
            table[list(factors)] = list(factors.values())
            state[tensor] = (axis, table)
        return state

    def transform(self, slab: Array, where: Region, state: Any) -> Array:
        axis, table = state[where.tensor]
        factors = table[where.slices[axis]].astype(slab.dtype)
        factors = factors.reshape([-1 if i == axis else 1 for i in range(slab.ndim)])
        return np.where(factors == 0, 0, slab * factors).astype(slab.dtype)

    @contextmanager
    def hook(self, model: Any, arch: Architecture, state: Any) -> Iterator[None]:
        places = dict.fromkeys((neuron.layer, neuron.expert) for neuron in self.neurons)
        with ExitStack() as stack:
            for layer, expert in places:
                own = {
                    n: a for n, a in self.neurons.items() if (n.layer, n.expert) == (layer, expert)
                }
                stack.enter_context(self._hook(model, arch, own))
            yield

    def _hook(self, model: Any, arch: Architecture, own: Mapping[Neuron, float]) -> Any:
        """Scales the neurons `own` of one layer and, where it has experts, of one of them."""
        first = next(iter(own))
        indices, factors = [neuron.neuron for neuron in own], list(own.values())
        [band, *_] = arch.gate_up_regions(first)[self.part]
        role = arch.roles[band.region.tensor].role

        def scale_outputs(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            # In a fused projection the gate comes first, then as many outputs for up.
            fused = role == "gate_up_proj" and self.part == "up"
            start = model.config.intermediate_size if fused else 0
            scaled = output.clone()
            scaled[..., [start + index for index in indices]] *= output.new_tensor(factors)
            return scaled

        def scale_expert(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            scales = {self.part: output.new_tensor(factors)}
            after = written(module, inputs, first.expert, indices, **scales)
            return output + after - written(module, inputs, first.expert, indices)

        hook = scale_outputs if first.expert is None else scale_expert
        return arch.module(model, role, first.layer).register_forward_hook(hook)
