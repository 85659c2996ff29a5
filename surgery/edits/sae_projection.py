"""Patches of `sae` that multiply weights: by what removes features, or by what adds them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from surgery.addresses import Region
from surgery.arch import Architecture
from surgery.checkpoint import TensorInfo
from surgery.checkpoint.delta import Factors
from surgery.edits.interface import Array, Edit, Reader, Target
from surgery.edits.projection import (
    OutputProjection,
    Vectors,
    along_rows,
    like,
    project,
    project_torch,
    projection,
)


@dataclass(frozen=True)
class Orthogonalize(OutputProjection):
    """The decoder rows leave everything that writes to the stream."""

    op: ClassVar[str] = "sae"


@dataclass(frozen=True)
class RankOne(OutputProjection):
    """W' = W + γ·D·EᵀW on everything that writes to the stream; biases too.

    D [width, k] are unit decoder rows; E [width, k], here `q`, the encoder columns of the same
    features, in the model's units. What a block adds, y, becomes y + γ·D·(Eᵀy): each feature is
    taken for its pre-activation without bias, never gated. The sum of what blocks add passes
    through the same map; that blocks read another stream after it is part of the effect.
    """

    op: ClassVar[str] = "sae"
    d: Vectors

    def transform(self, slab: Array, where: Region, state: Any) -> Array:
        if self.strength == 0:
            return slab
        left, right = self._added(slab, where, state)
        return (slab + left @ right).astype(slab.dtype)

    def factors(self, slab: Array, where: Region, state: Any) -> Factors | None:
        return self._added(slab, where, state) if slab.ndim == 2 else None

    def _added(self, slab: Array, where: Region, state: Any) -> Factors:
        """What is added to `slab` as factors, in float64 as `projection` is."""
        along = state[where.tensor]
        if along is None:
            return slab.astype(np.float64) @ self.q, self.strength * self.d.T
        return self.strength * self.d[where.slices[0]], along[(slice(None), *where.slices[1:])]

    def _project_output(self, module: Any, inputs: Any, output: Any) -> Any:
        d, e = like(self.d, output), like(self.q, output)
        return output + self.strength * (output @ e) @ d.T


@dataclass(frozen=True)
class ZProject(Edit):
    """z ↦ z − s·QQᵀz before the output projection of one layer."""

    op: ClassVar[str] = "sae"
    q: Vectors
    strength: float
    layer: int

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        tensor = arch.name("o_proj", self.layer)
        return (Target(Region.whole(tensor, tensors[tensor].shape), "input"),)

    def prepare(self, arch: Architecture, reader: Reader) -> Vectors | None:
        tensor = arch.name("o_proj", self.layer)
        return along_rows(tensor, self.q, arch.input_axis("o_proj"), reader)

    def transform(self, slab: Array, where: Region, state: Vectors | None) -> Array:
        return project(slab, self.q, self.strength, where, state)

    def factors(self, slab: Array, where: Region, state: Vectors | None) -> Factors | None:
        if slab.ndim != 2:
            return None
        return projection(slab, self.q, self.strength, where, state)

    def hook(self, model: Any, arch: Architecture, state: Any) -> AbstractContextManager[None]:
        def project_input(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (project_torch(inputs[0], self.q, self.strength), *inputs[1:])

        module = arch.module(model, "o_proj", self.layer)
        handle: AbstractContextManager[None] = module.register_forward_pre_hook(project_input)
        return handle
