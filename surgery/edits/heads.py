"""`heads`: scale attention heads where the output projection reads them (PH3, arXiv 2402.18154).

Zeroing the slice of `o_proj` that reads head h equals zeroing the head's output z_h: it removes
what the head writes, its value bias included, and leaves the projection's own bias. Under
grouped-query attention only this slice is touched, never the shared keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from surgery.addresses import Head, Region, parse_head
from surgery.arch import Architecture
from surgery.checkpoint import TensorInfo
from surgery.edits.interface import Array, Edit, Fields, RecipeFiles, Target
from surgery.edits.scale import scale
from surgery.edits.selection import select


class HeadsFields(Fields):
    """`{op: heads, heads: [L2H1], factor: 0.0}`, or `file: heads.csv` with `top`."""

    op: Literal["heads"]
    heads: list[str] | None = None
    file: str | None = None
    top: PositiveInt | None = None
    factor: float = 0.0

    def build(self, arch: Architecture, files: RecipeFiles) -> HeadsEdit:
        heads = select(("layer", "head"), self.heads, self.file, self.top, files, parse_head, Head)
        return HeadsEdit(heads, self.factor)


@dataclass(frozen=True)
class HeadsEdit(Edit):
    """z_h ↦ factor · z_h for each head."""

    op: ClassVar[str] = "heads"
    heads: tuple[Head, ...]
    factor: float

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        return tuple(Target(arch.head_region(head), "input") for head in self.heads)

    def transform(self, slab: Array, where: Region, state: None) -> Array:
        return scale(slab, self.factor)

    @contextmanager
    def hook(self, model: Any, arch: Architecture, state: None) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in sorted({head.layer for head in self.heads}):
                chosen = [head.head for head in self.heads if head.layer == layer]
                stack.enter_context(self._hook_layer(model, arch, layer, chosen))
            yield

    def _hook_layer(
        self, model: Any, arch: Architecture, layer: int, heads: list[int]
    ) -> AbstractContextManager[Any]:
        count = model.config.num_attention_heads

        def scale_heads(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            z = inputs[0].unflatten(-1, (count, -1)).clone()
            z[..., heads, :] *= self.factor
            return (z.flatten(-2), *inputs[1:])

        handle: AbstractContextManager[Any] = arch.module(
            model, "o_proj", layer
        ).register_forward_pre_hook(scale_heads)
        return handle
