"""`head_spectrum`: scale singular components of a head's circuits (arXiv 2406.09519).

In row vectors, W_OV = W_V·W_O = Σ σ_i u_i v_iᵀ and W_QK = W_Q·W_Kᵀ = Σ σ_i u_i v_iᵀ, both of
residual width. Scaling component i by α is exact

- `ov`, on the head's part of the output projection: W_O(I − (1−α) v_i v_iᵀ). Keys and values that
  other heads share are not touched; what a value bias writes through the head is scaled too.
- `qk`, on the head's queries: (I − (1−α) u_i u_iᵀ)W_Q, where queries and keys meet as they are:
  not with rotary embedding, nor with norms of queries and keys. A query bias is not touched.

`fold_norm` finds the components of W_OV with the scale of the norm before attention in it, as
TransformerLens has it (and, of a LayerNorm, without the mean, which it takes out).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeInt

from surgery.addresses import Head, Region, parse_head
from surgery.arch import Architecture
from surgery.checkpoint import TensorInfo
from surgery.edits.interface import Array, Edit, Fields, Reader, RecipeFiles, Target
from surgery.edits.projection import Vectors, project, project_torch
from surgery.edits.selection import select
from surgery.edits.spectrum import chosen, of_product, refuse_missing, refuse_nonfinite
from surgery.errors import EditError, RecipeError

NORM = "input_norm"


class HeadSpectrumFields(Fields):
    """`{op: head_spectrum, heads: [L2H1], circuit: ov, components: [0], factor: 0.0}`."""

    op: Literal["head_spectrum"]
    heads: list[str]
    components: Annotated[list[NonNegativeInt], Field(min_length=1)]
    circuit: Literal["ov", "qk"] = "ov"
    factor: float = 0.0
    fold_norm: bool = False

    def build(self, arch: Architecture, files: RecipeFiles) -> Edit:
        heads = select(("layer", "head"), self.heads, None, None, files, parse_head, Head)
        if len(set(self.components)) != len(self.components):
            raise RecipeError("a component is named twice")
        refuse_missing(self.components, min(arch.sizes["head_dim"], arch.width), "a head's circuit")
        if self.circuit == "qk":
            _refuse_qk(arch, self.fold_norm)
            return QueryKey(heads, tuple(self.components), self.factor)
        if self.fold_norm and NORM not in arch.facts.modules:
            raise EditError(f"{arch.family} has no norm before attention for fold_norm to fold in")
        return OutputValue(heads, tuple(self.components), self.factor, self.fold_norm)


def _refuse_qk(arch: Architecture, fold_norm: bool) -> None:
    if fold_norm:
        raise EditError("fold_norm has no meaning with circuit qk: W_Q alone cannot hold the scale")
    if "q_norm" in arch.facts.modules:
        raise EditError(f"circuit qk is not exact on {arch.family}, which normalises its queries")
    if "position_embed" not in arch.facts.modules:
        raise EditError(
            f"circuit qk is not exact on {arch.family}, which turns queries and keys by their "
            "positions before they meet"
        )


def computing(arch: Architecture, part: str, head: Head) -> tuple[Region, int]:
    """Where the `q` of a head, or the `k` or `v` it reads, is computed: the region of the stored
    weight, and the axis of that region that runs along the head's dimensions.

    Raises `EditError` for a head this model does not have.
    """
    arch.head_region(head)
    dim = arch.sizes["head_dim"]
    shared = arch.sizes["heads"] // arch.sizes["kv_heads"]
    start = dim * (head.head if part == "q" else head.head // shared)
    role = f"{part}_proj"
    if role not in arch.facts.modules:
        role = "qkv_proj"
        start += arch.sizes["z_width"] * arch.facts.modules[role].parts.index(part)
    axis = 1 - arch.input_axis(role)
    shape = arch.shape(role)
    return Region.band(arch.name(role, head.layer), shape, axis, start, start + dim), axis


def read(reader: Reader, region: Region, axis: int) -> Vectors:
    """A region of a matrix as float64 [residual width, head_dim]; `axis` runs along the latter."""
    parts = []
    for band, slab in reader.rows(region.tensor):
        rows = Region(region.tensor, (band.start, 0), (band.start + len(slab), slab.shape[1]))
        if rows.overlaps(region):
            parts.append(slab[region.intersection(rows).within(rows)].astype(np.float64))
    matrix = np.concatenate(parts)
    return matrix if axis == 1 else matrix.T


@dataclass(frozen=True)
class Part:
    """What is scaled of one head: `q` [width, components] and, where the width runs along the
    rows of `region`, qᵀW [components, head_dim] of it."""

    head: Head
    region: Region
    q: Vectors
    along: Vectors | None

    def transform(self, slab: Array, where: Region, strength: float) -> Array:
        start, stop = (
            tuple(a - b for a, b in zip(corner, self.region.start, strict=True))
            for corner in (where.start, where.stop)
        )
        inside = Region(where.tensor, start, stop)
        return project(slab, self.q, strength, inside, self.along)


@dataclass(frozen=True)
class CircuitSpectrum(Edit):
    """Scales the chosen components of one circuit of each head."""

    op: ClassVar[str] = "head_spectrum"
    heads: tuple[Head, ...]
    components: tuple[int, ...]
    factor: float

    @abstractmethod
    def written(self, arch: Architecture, head: Head) -> tuple[Region, int]:
        """The region that is edited for a head, and its axis of the head's dimensions."""

    @abstractmethod
    def vectors(self, arch: Architecture, reader: Reader, head: Head) -> Vectors:
        """The directions of the stream [width, components] that are scaled."""

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        return tuple(Target(self.written(arch, head)[0], "value") for head in self.heads)

    def prepare(self, arch: Architecture, reader: Reader) -> tuple[Part, ...]:
        return tuple(self._part(arch, reader, head) for head in self.heads)

    def _part(self, arch: Architecture, reader: Reader, head: Head) -> Part:
        region, axis = self.written(arch, head)
        if self.factor == 1:
            return Part(head, region, np.zeros((arch.width, 0)), None)
        q = self.vectors(arch, reader, head)
        return Part(head, region, q, q.T @ read(reader, region, axis) if axis == 1 else None)

    def chosen(self, head: Head, squares: Vectors, vectors: Vectors) -> Vectors:
        return chosen(squares, vectors, self.components, f"{head}'s circuit")

    def transform(self, slab: Array, where: Region, state: tuple[Part, ...]) -> Array:
        [part] = [part for part in state if part.region.overlaps(where)]
        return part.transform(slab, where, 1 - self.factor)


@dataclass(frozen=True)
class OutputValue(CircuitSpectrum):
    """What a head writes loses (1 − factor) of its part along the chosen v_i."""

    fold_norm: bool

    def written(self, arch: Architecture, head: Head) -> tuple[Region, int]:
        return arch.head_region(head), arch.input_axis("o_proj")

    def vectors(self, arch: Architecture, reader: Reader, head: Head) -> Vectors:
        values = read(reader, *computing(arch, "v", head))
        if self.fold_norm:
            values = _folded(values, arch, reader, head.layer)
        outputs = read(reader, *self.written(arch, head))
        refuse_nonfinite(np.concatenate([values, outputs]), head)
        _, squares, right = of_product(values, outputs)
        return self.chosen(head, squares, right)

    @contextmanager
    def hook(self, model: Any, arch: Architecture, state: tuple[Part, ...]) -> Iterator[None]:
        count = model.config.num_attention_heads

        def scale(part: Part, module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            alone = inputs[0].unflatten(-1, (count, -1)).clone()
            others = [head for head in range(count) if head != part.head.head]
            alone[..., others, :] = 0
            z = alone.flatten(-2)
            written = module.forward(z) - module.forward(0 * z)
            return output - written + project_torch(written, part.q, 1 - self.factor)

        with ExitStack() as stack:
            for part in state:
                module = arch.module(model, "o_proj", part.head.layer)
                stack.enter_context(module.register_forward_hook(partial(scale, part)))
            yield


@dataclass(frozen=True)
class QueryKey(CircuitSpectrum):
    """A head's queries read (1 − factor) less of the stream along the chosen u_i."""

    def written(self, arch: Architecture, head: Head) -> tuple[Region, int]:
        return computing(arch, "q", head)

    def vectors(self, arch: Architecture, reader: Reader, head: Head) -> Vectors:
        queries, keys = (read(reader, *computing(arch, part, head)) for part in "qk")
        refuse_nonfinite(np.concatenate([queries, keys]), head)
        left, squares, _ = of_product(queries, keys)
        return self.chosen(head, squares, left)

    @contextmanager
    def hook(self, model: Any, arch: Architecture, state: tuple[Part, ...]) -> Iterator[None]:
        dim = model.config.hidden_size // model.config.num_attention_heads

        def scale(part: Part, module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            queries = slice(part.head.head * dim, (part.head.head + 1) * dim)
            scaled = output.clone()
            projected = project_torch(inputs[0], part.q, 1 - self.factor)
            scaled[..., queries] = module.forward(projected)[..., queries]
            return scaled

        with ExitStack() as stack:
            for part in state:
                role = arch.roles[part.region.tensor]
                module = arch.module(model, role.role, role.layer)
                stack.enter_context(module.register_forward_hook(partial(scale, part)))
            yield


def _folded(values: Vectors, arch: Architecture, reader: Reader, layer: int) -> Vectors:
    """W_V [width, head_dim] as it reads what the norm before it has only centred and divided."""
    scale = np.concatenate([slab for _, slab in reader.rows(arch.name(NORM, layer))])
    folded = scale.astype(np.float64)[:, None] * values
    return folded - folded.mean(axis=0) if arch.facts.norm == "layer" else folded
