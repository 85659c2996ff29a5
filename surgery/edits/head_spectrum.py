"""`head_spectrum`: scale singular components of a head's circuits (arXiv 2406.09519).

In row vectors, W_OV = W_V·W_O = Σ σ_i u_i v_iᵀ and W_QK = W_Q·W_Kᵀ = Σ σ_i u_i v_iᵀ, both of
residual width. Scaling component i by α is exact

- `ov`, on the head's part of the output projection: W_O(I − (1−α) v_i v_iᵀ). Keys and values that
  other heads share are not touched; what a value bias writes through the head is scaled too.
- `qk`, on the head's queries: (I − (1−α) u_i u_iᵀ)W_Q, where queries and keys meet as they are:
  not with rotary embedding, norms of queries and keys, or bounds. A query bias is not touched.

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
from surgery.arch import Architecture, Band
from surgery.checkpoint import TensorInfo
from surgery.edits.interface import Array, Edit, Fields, Reader, RecipeFiles, Target
from surgery.edits.projection import Vectors, project, project_torch
from surgery.edits.selection import select
from surgery.edits.spectrum import chosen, of_product, refuse_missing, refuse_nonfinite
from surgery.errors import EditError, RecipeError


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
            refuse_qk(arch, self.fold_norm)
            return QueryKey(heads, tuple(self.components), self.factor)
        if self.fold_norm and _norm(arch, computing(arch, "v", heads[0])) is None:
            raise EditError(f"{arch.family} has no norm before attention for fold_norm to fold in")
        return OutputValue(heads, tuple(self.components), self.factor, self.fold_norm)


def refuse_qk(arch: Architecture, fold_norm: bool) -> None:
    """Raises `EditError` where queries and keys do not meet as W_Q and W_K give them."""
    if fold_norm:
        raise EditError("fold_norm has no meaning with circuit qk: W_Q alone cannot hold the scale")
    if arch.qk_norm:
        raise EditError(f"circuit qk is not exact on {arch.family}, which normalises its queries")
    if arch.facts.positions == "rotary":
        raise EditError(
            f"circuit qk is not exact on {arch.family}, which turns queries and keys by their "
            "positions before they meet"
        )
    if arch.qkv_clip:
        raise EditError(
            f"circuit qk is not exact on this {arch.family}, which bounds queries and keys "
            f"(config.json: {arch.facts.clip}) before they meet"
        )


def computing(arch: Architecture, part: str, head: Head) -> Band:
    """Where the `q` of a head, or the `k` or `v` it reads, is computed: of the stored weight.

    Raises `EditError` for a head this model does not have.
    """
    return arch.qkv_regions(head)[part][0]


def read(reader: Reader, band: Band) -> Vectors:
    """A band of a matrix as float64 [residual width, head_dim]; its axis runs along the latter."""
    region, parts = band.region, []
    for found, slab in reader.rows(region.tensor):
        rows = Region(region.tensor, (found.start, 0), (found.start + len(slab), slab.shape[1]))
        if rows.overlaps(region):
            parts.append(slab[region.intersection(rows).within(rows)].astype(np.float64))
    matrix = np.concatenate(parts)
    return matrix if band.axis == 1 else matrix.T


def reads(arch: Architecture, reader: Reader, part: str, head: Head, fold_norm: bool) -> Vectors:
    """W_Q, W_K or W_V (`part` q, k or v) of a head, float64 [residual width, head_dim]: as it is
    stored, or with the scale of the norm before it."""
    band = computing(arch, part, head)
    matrix, norm = read(reader, band), _norm(arch, band) if fold_norm else None
    return matrix if norm is None else _folded(matrix, arch, reader, arch.name(norm, head.layer))


def writes(arch: Architecture, reader: Reader, head: Head) -> Vectors:
    """W_O of a head, transposed: float64 [residual width, head_dim]."""
    return read(reader, _output(arch, head))


def _output(arch: Architecture, head: Head) -> Band:
    return Band(arch.head_region(head), arch.input_axis("o_proj"))


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
    def written(self, arch: Architecture, head: Head) -> Band:
        """What is edited for a head, along the axis of the head's dimensions."""

    @abstractmethod
    def vectors(self, arch: Architecture, reader: Reader, head: Head) -> Vectors:
        """The directions of the stream [width, components] that are scaled."""

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        return tuple(Target(self.written(arch, head).region, "value") for head in self.heads)

    def prepare(self, arch: Architecture, reader: Reader) -> tuple[Part, ...]:
        return tuple(self._part(arch, reader, head) for head in self.heads)

    def _part(self, arch: Architecture, reader: Reader, head: Head) -> Part:
        band = self.written(arch, head)
        if self.factor == 1:
            return Part(head, band.region, np.zeros((arch.width, 0)), None)
        q = self.vectors(arch, reader, head)
        return Part(head, band.region, q, q.T @ read(reader, band) if band.axis == 1 else None)

    def chosen(self, head: Head, squares: Vectors, vectors: Vectors) -> Vectors:
        return chosen(squares, vectors, self.components, f"{head}'s circuit")

    def transform(self, slab: Array, where: Region, state: tuple[Part, ...]) -> Array:
        [part] = [part for part in state if part.region.overlaps(where)]
        return part.transform(slab, where, 1 - self.factor)


@dataclass(frozen=True)
class OutputValue(CircuitSpectrum):
    """What a head writes loses (1 − factor) of its part along the chosen v_i."""

    fold_norm: bool

    def written(self, arch: Architecture, head: Head) -> Band:
        return _output(arch, head)

    def vectors(self, arch: Architecture, reader: Reader, head: Head) -> Vectors:
        values = reads(arch, reader, "v", head, self.fold_norm)
        outputs = writes(arch, reader, head)
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

    def written(self, arch: Architecture, head: Head) -> Band:
        return computing(arch, "q", head)

    def vectors(self, arch: Architecture, reader: Reader, head: Head) -> Vectors:
        queries, keys = (reads(arch, reader, part, head, False) for part in "qk")
        refuse_nonfinite(np.concatenate([queries, keys]), head)
        left, squares, _ = of_product(queries, keys)
        return self.chosen(head, squares, left)

    @contextmanager
    def hook(self, model: Any, arch: Architecture, state: tuple[Part, ...]) -> Iterator[None]:
        def scale(part: Part, module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            layout = arch.facts.modules[arch.roles[part.region.tensor].role].layout
            queries = _queries(model.config, layout, output.shape[-1], part.head.head)
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


def _queries(config: Any, layout: str, outputs: int, head: int) -> slice:
    """Which of the `outputs` of a live projection are a head's queries, by the model's own config
    and the size of what it gives: fused in groups, each head's lie before the group's key and
    value; else they come first."""
    heads = config.num_attention_heads
    dim = config.hidden_size // heads
    before = head
    if layout == "groups":
        groups = (outputs // dim - heads) // 2
        before += 2 * (head // (heads // groups))
    return slice(before * dim, (before + 1) * dim)


def _norm(arch: Architecture, band: Band) -> str | None:
    """The role of the norm between the stream and the projection of `band`, if there is one."""
    return arch.facts.modules[arch.roles[band.region.tensor].role].norm


def _folded(matrix: Vectors, arch: Architecture, reader: Reader, norm: str) -> Vectors:
    """A matrix [width, head_dim] as it reads what the norm before it only centred and divided."""
    weight = np.concatenate([slab for _, slab in reader.rows(norm)]).astype(np.float64)
    folded = (weight + arch.facts.norm_offset)[:, None] * matrix
    return folded - folded.mean(axis=0) if arch.facts.norm == "layer" else folded
