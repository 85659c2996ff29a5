"""`lm_head_spectrum`: scale singular components of the output head (EigenShift, arXiv 2509.16660).

With the head W [vocab, width] = UΣVᵀ, scaling σ_i by α for the chosen i is
W' = W(I − (1−α)·Σ v_i v_iᵀ): only V is needed, from WᵀW [width, width], summed in float64. The
live model's final state loses (1−α) of its part along each v_i before the head.

The paper's sources disagree on how many of the best components by score to scale, and by how
much: `preset: code` is 5 by 0.1 and `preset: note` 1024 by 0.9. Neither is endorsed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from surgery.addresses import Region
from surgery.arch import Architecture
from surgery.checkpoint import TensorInfo
from surgery.edits.interface import Array, Edit, Fields, Reader, RecipeFiles, Target
from surgery.edits.projection import Vectors, project, project_torch
from surgery.edits.selection import select
from surgery.edits.spectrum import chosen, of_gram, refuse_missing, refuse_nonfinite
from surgery.errors import EditError, RecipeError

PRESETS = {"code": (5, 0.1), "note": (1024, 0.9)}
"""How many components, and the factor, as two sources of the paper have it."""


class LmHeadSpectrumFields(Fields):
    """`{op: lm_head_spectrum, components: [0, 5], factor: 0.1}`, or `file: scores.csv` (columns
    component[,score]) with `top` and `factor`, or with `preset`."""

    op: Literal["lm_head_spectrum"]
    components: list[NonNegativeInt] | None = None
    file: str | None = None
    top: PositiveInt | None = None
    factor: float | None = None
    preset: Literal["code", "note"] | None = None

    def build(self, arch: Architecture, files: RecipeFiles) -> LmHeadSpectrum:
        top, factor = self._amounts()
        head = arch.facts.tie.head
        if not arch.tied and arch.name(head) not in arch.roles:
            raise EditError(f"this {arch.family} checkpoint has no output head")
        components = select(("component",), self.components, self.file, top, files, int, int)
        refuse_missing(components, min(arch.shape(head)), arch.name(head))
        return LmHeadSpectrum(components, factor)

    def _amounts(self) -> tuple[int | None, float]:
        if self.preset is not None:
            if self.file is None or self.top is not None or self.factor is not None:
                raise RecipeError("preset goes with file, and sets top and factor itself")
            return PRESETS[self.preset]
        if self.factor is None:
            raise RecipeError("give factor, or file with preset")
        return self.top, self.factor


@dataclass(frozen=True)
class LmHeadSpectrum(Edit):
    """h ↦ h − (1 − factor)·VVᵀh before the head, V the chosen right singular vectors."""

    op: ClassVar[str] = "lm_head_spectrum"
    components: tuple[int, ...]
    factor: float

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        # The vectors are those of this W: no other edit of it commutes with finding them.
        head = arch.facts.tie.head
        return (Target(Region.whole(arch.name(head), arch.shape(head)), "value"),)

    def prepare(self, arch: Architecture, reader: Reader) -> Vectors:
        if self.factor == 1:
            return np.zeros((arch.width, 0))
        head = arch.name(arch.facts.tie.head)
        return chosen(*spectrum(reader, head, arch.width), self.components, head)

    def transform(self, slab: Array, where: Region, state: Vectors) -> Array:
        return project(slab, state, 1 - self.factor, where, None)

    def hook(self, model: Any, arch: Architecture, state: Any) -> AbstractContextManager[None]:
        def scale_components(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (project_torch(inputs[0], state, 1 - self.factor), *inputs[1:])

        head = arch.module(model, arch.facts.tie.head)
        handle: AbstractContextManager[None] = head.register_forward_pre_hook(scale_components)
        return handle


def spectrum(reader: Reader, head: str, width: int) -> tuple[Vectors, Vectors]:
    """Squared singular values [width], falling, and right singular vectors [width, width], in
    columns, of the tensor `head` [vocab, width]; raises `EditError` where it is not finite."""
    gram = np.zeros((width, width))
    for _, slab in reader.rows(head):
        rows = slab.astype(np.float64)
        gram += rows.T @ rows
    refuse_nonfinite(gram, head)
    return of_gram(gram)
