"""What `heads` and `neurons` share: scaling some inputs of a projection, about zero or a mean."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from surgery.addresses import Region
from surgery.arch import Architecture, Band
from surgery.checkpoint import TensorInfo
from surgery.edits.biases import InputShift, Vectors, add
from surgery.edits.interface import Array, Edit, Layout, Reader, Target
from surgery.edits.pruning import Pruning
from surgery.errors import RecipeError


def scale(slab: Array, factor: float) -> Array:
    """`slab` times `factor`; a factor of 0 gives +0.0 everywhere, NaN and -1 included."""
    return np.zeros_like(slab) if factor == 0 else slab * slab.dtype.type(factor)


@dataclass(frozen=True, kw_only=True)
class InputScaling(Edit):
    """x_i ↦ m_i + factor · (x_i − m_i) for some inputs i of a projection, m being `mean` or zero.

    The projection's weight is scaled along its input, its bias gains (1 − factor)·Σ W[:, i]·m_i.
    With `pruning`, inputs that became zero are left out with all that computes them.
    """

    role: ClassVar[str]
    factor: float
    mean: Vectors | None = None
    pruning: Pruning | None = None

    @abstractmethod
    def regions(self, arch: Architecture) -> tuple[Region, ...]:
        """Where the projection reads these inputs."""

    @abstractmethod
    def places(self) -> Iterator[tuple[int, int]]:
        """The inputs as indices into `mean`."""

    @property
    def shift(self) -> InputShift:
        """(1 − factor)·m for these inputs; without a mean, of no layer."""
        shifts: dict[int, Vectors] = {}
        if self.mean is not None:
            for layer, index in self.places():
                shift = shifts.setdefault(layer, np.zeros_like(self.mean[layer]))
                shift[index] = (1 - self.factor) * self.mean[layer, index]
        return InputShift(self.role, {layer: shift.ravel() for layer, shift in shifts.items()})

    def check(self, arch: Architecture) -> None:
        """Raises `RecipeError` or `EditError` where this model cannot be edited so."""
        if self.pruning is not None and self.factor != 0:
            raise RecipeError("prune leaves out what is zero: it goes with factor 0")
        self.layout(arch)

    def layout(self, arch: Architecture) -> Layout:
        layout = self.shift.layout(arch)
        if self.pruning is None:
            return layout
        return Layout(layout.additions, {**layout.config, **self.pruning.config(arch)})

    def drops(self, arch: Architecture) -> tuple[Band, ...]:
        return () if self.pruning is None else tuple(self.pruning.bands(arch))

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        scaled = (Target(region, "input") for region in self.regions(arch))
        return (*scaled, *self.shift.targets(arch, tensors))

    def prepare(self, arch: Architecture, reader: Reader) -> dict[str, Vectors]:
        return self.shift.prepare(arch, reader)

    def transform(self, slab: Array, where: Region, state: dict[str, Vectors]) -> Array:
        if where.tensor in state:
            return add(slab, state[where.tensor][where.slices])
        return scale(slab, self.factor)

    def changed(self, x: Any, layer: int, inputs: list[int]) -> Any:
        """What becomes of `inputs` of the layer's projection in a live model; x holds just them,
        in the order and shape that `mean[layer]` has them."""
        if self.mean is None:
            return self.factor * x
        import torch

        mean = torch.from_numpy(self.mean[layer, inputs]).to(x)
        return mean + self.factor * (x - mean)
