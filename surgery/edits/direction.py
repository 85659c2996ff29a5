"""`direction`: take one direction out of what is written to the stream (arXiv 2406.11717).

With the unit vector r, W' = W − s·r rᵀW for everything that writes to the residual stream, or for
the roles named; biases lose their part along r too. `keep_norms: columns` then gives each vector
of residual width (a column of a Linear, a row of a Conv1D or an embedding) the norm it had: that
multiplies inputs, so that rᵀW' stays what it was, zero at s = 1. Rescaling output rows would not
keep it. Biases are projected and not rescaled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt

from surgery.addresses import Region, parse_layers
from surgery.arch import Architecture, Writer
from surgery.checkpoint import TensorFile, TensorInfo
from surgery.edits.experts import written
from surgery.edits.interface import Array, Edit, Fields, Reader, RecipeFiles, Target
from surgery.edits.projection import OutputProjection, Vectors, project_torch, refuse_inexact
from surgery.errors import EditError, RecipeError, quote

LEAST_LEFT = 1e-4
"""A vector that keeps less than this part of its norm is not rescaled: what is left of it is the
rounding of what was taken out, and would be blown up to full size."""


class VectorSource(BaseModel):
    """One vector of a safetensors file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    file: str
    key: str

    def read(self, files: RecipeFiles, width: int) -> Vectors:
        """The vector scaled to norm 1, float64 [width]; raises `EditError` if it is none."""
        file = TensorFile.open(files.path(self.file))
        shape = file.info(self.key).shape
        if shape != (width,):
            raise EditError(
                f"{file.path}: {quote(self.key)} has shape {list(shape)}; this model's residual "
                f"stream has [{width}]"
            )
        vector = file.read(self.key)
        norm = float(np.linalg.norm(vector))
        if not np.isfinite(norm) or norm == 0:
            raise EditError(f"{file.path}: {quote(self.key)} has norm {norm}")
        return np.asarray(vector / norm, np.float64)


class DirectionFields(Fields):
    """`{op: direction, vector: {file: d.safetensors, key: refusal}, strength: 1.0}`.

    `matrices` is `writers` or a list of roles that write to the stream; `layers: all` takes the
    embeddings in as well, and so does naming their roles.
    """

    op: Literal["direction"]
    vector: VectorSource
    strength: float = 1.0
    matrices: Literal["writers"] | list[str] = "writers"
    layers: str | list[NonNegativeInt] = "all"
    keep_norms: Literal["none", "columns"] = "none"
    approximate: bool = False

    def build(self, arch: Architecture, files: RecipeFiles) -> Edit:
        roles = None if self.matrices == "writers" else frozenset(_writing(arch, self.matrices))
        q = self.vector.read(files, arch.width)[:, None]
        layers = parse_layers(self.layers, arch.layers)
        embeddings = self.layers == "all" or roles is not None
        made = Direction if self.keep_norms == "none" else NormKeepingDirection
        edit = made(q, self.strength, layers, embeddings, roles)
        if not self.approximate:
            refuse_inexact("direction", arch, edit.writers(arch))
        return edit


def _writing(arch: Architecture, roles: str | list[str]) -> list[str]:
    writing = [role for role, module in arch.facts.modules.items() if module.writes]
    wrong = [role for role in roles if role not in writing]
    if wrong or not roles:
        found = quote(wrong[0]) if wrong else "an empty list"
        raise RecipeError(
            f"matrices names {found}; what writes to the stream in {arch.family} is "
            f"{', '.join(writing)}"
        )
    return list(roles)


@dataclass(frozen=True)
class Direction(OutputProjection):
    """What the writers add loses its part along q [width, 1]; `roles`: only these, if given."""

    op: ClassVar[str] = "direction"
    roles: frozenset[str] | None

    def writers(self, arch: Architecture) -> tuple[Writer, ...]:
        found = super().writers(arch)
        if self.roles is None:
            return found
        return tuple(w for w in found if arch.roles[w.tensor].role in self.roles)


@dataclass(frozen=True)
class NormKeepingDirection(Direction):
    """The same, and each vector of residual width that a matrix writes keeps its norm."""

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        # The norms are those of this W: what mixes its columns does not commute with keeping them.
        return tuple(replace(target, side="value") for target in super().targets(arch, tensors))

    def prepare(self, arch: Architecture, reader: Reader) -> dict[str, Columns | None]:
        along = super().prepare(arch, reader)
        return {t: None if q is None else self.columns(t, q, reader) for t, q in along.items()}

    def factors(self, slab: Array, where: Region, state: Any) -> None:
        """None: what keeps norms is no low-rank change."""
        return

    def columns(self, tensor: str, along: Vectors, reader: Reader) -> Columns:
        """What a matrix needs whose rows run along the stream, from its rᵀW `along`."""
        squares = sum(
            np.square(slab, dtype=np.float64).sum(axis=0) for _, slab in reader.rows(tensor)
        )
        return Columns(along, self._factors(np.asarray(squares), along[0]))

    def _factors(self, squares: Vectors, parts: Vectors) -> Vectors:
        """What gives vectors with squared norms `squares` and `parts` along r their norm back."""
        left = squares - (2 - self.strength) * self.strength * parts**2
        kept = left > LEAST_LEFT**2 * squares
        return np.sqrt(np.divide(squares, left, out=np.ones_like(left), where=kept))

    def transform(self, slab: Array, where: Region, state: Any) -> Array:
        columns: Columns | None = state[where.tensor]
        along = None if columns is None else columns.along
        projected = super().transform(slab, where, {where.tensor: along})
        if self.strength == 0 or slab.ndim == 1:
            return projected
        if columns is not None:
            factors = columns.factors[where.slices[1]]
        else:
            wide = slab.astype(np.float64)
            factors = self._factors((wide**2).sum(axis=1), wide @ self.q[:, 0])[:, None]
        return (projected * factors).astype(slab.dtype)

    @contextmanager
    def hook(self, model: Any, arch: Architecture, state: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for role, module in self.modules(model, arch):
                fact = arch.facts.modules[role]
                if fact.type == "embedding":
                    stack.enter_context(module.register_forward_hook(self._turn_rows))
                    continue
                if fact.per_expert:
                    stack.enter_context(module.register_forward_hook(self._scale_experts))
                else:
                    stack.enter_context(module.register_forward_pre_hook(self._scale_input))
                stack.enter_context(module.register_forward_hook(self._project_output))
            yield

    def _turn_rows(self, module: Any, inputs: Any, output: Any) -> Any:
        projected = project_torch(output, self.q, self.strength)
        norms = [x.norm(dim=-1, keepdim=True) for x in (output, projected)]
        return projected * norms[0] / norms[1]

    def _scale_input(self, module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        import torch

        weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
        return (inputs[0] * self._live_factors(weight).to(inputs[0]), *inputs[1:])

    def _scale_experts(self, module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        for expert, weight in enumerate(module.down_proj):
            more = (self._live_factors(weight) - 1).to(output)
            output = output + written(module, inputs, expert, slice(None), by=more)
        return output

    def _live_factors(self, weight: Any) -> Any:
        """By what each column of a live Linear's weight is multiplied: float64 [in]."""
        written = weight.double().T
        projected = project_torch(written, self.q, self.strength)
        return written.norm(dim=-1) / projected.norm(dim=-1)


@dataclass(frozen=True)
class Columns:
    """Of a matrix whose rows run along the stream: rᵀW [1, columns], and each column's factor."""

    along: Vectors
    factors: Vectors
