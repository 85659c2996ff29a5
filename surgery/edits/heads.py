"""`heads`: scale attention heads where the output projection reads them (PH3, arXiv 2402.18154).

Zeroing the slice of `o_proj` that reads head h equals zeroing the head's output z_h: it removes
what the head writes, its value bias included, and leaves the projection's own bias. Under
grouped-query attention only this slice is touched, never the shared keys and values.

With `mean`, z_h ↦ m_h + factor·(z_h − m_h): the slice is scaled and the bias of `o_proj` gains
(1 − factor)·W_o[:, h]·m_h, several heads of a layer in one sum (mean ablation at factor 0).

With `prune`, heads that became zero are left out of the checkpoint: see `pruning`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from surgery.addresses import Head, Region, parse_head
from surgery.arch import Architecture
from surgery.edits.biases import MeanSource
from surgery.edits.interface import Fields, RecipeFiles
from surgery.edits.pruning import HeadPruning
from surgery.edits.scale import InputScaling
from surgery.edits.selection import select


class HeadsFields(Fields):
    """`{op: heads, heads: [L2H1], factor: 0.0}`, or `file: heads.csv` with `top`.

    `mean: {file: means.safetensors, key: mean}` is a tensor [layers, heads, head_dim]. With
    `prune: true` heads of factor 0 are left out, and the config counts fewer.
    """

    op: Literal["heads"]
    heads: list[str] | None = None
    file: str | None = None
    top: PositiveInt | None = None
    factor: float = 0.0
    mean: MeanSource | None = None
    prune: bool = False

    def build(self, arch: Architecture, files: RecipeFiles) -> HeadsEdit:
        heads = select(("layer", "head"), self.heads, self.file, self.top, files, parse_head, Head)
        for head in heads:
            arch.head_region(head)
        shape = (arch.layers, arch.sizes["heads"], arch.sizes["head_dim"])
        mean = None if self.mean is None else self.mean.read(files, shape)
        pruning = HeadPruning(heads) if self.prune else None
        edit = HeadsEdit(heads=heads, factor=self.factor, mean=mean, pruning=pruning)
        edit.check(arch)
        return edit


@dataclass(frozen=True, kw_only=True)
class HeadsEdit(InputScaling):
    """z_h ↦ m_h + factor · (z_h − m_h) for each head; `mean` is float64 [layers, heads, dh]."""

    op: ClassVar[str] = "heads"
    role: ClassVar[str] = "o_proj"
    heads: tuple[Head, ...]

    def regions(self, arch: Architecture) -> tuple[Region, ...]:
        return tuple(map(arch.head_region, self.heads))

    def places(self) -> Iterator[tuple[int, int]]:
        return ((head.layer, head.head) for head in self.heads)

    @contextmanager
    def hook(self, model: Any, arch: Architecture, state: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in sorted({head.layer for head in self.heads}):
                chosen = [head.head for head in self.heads if head.layer == layer]
                stack.enter_context(self._hook_layer(model, arch, layer, chosen))
            yield

    def _hook_layer(
        self, model: Any, arch: Architecture, layer: int, heads: list[int]
    ) -> AbstractContextManager[Any]:
        count = model.config.num_attention_heads

        def change_heads(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            z = inputs[0].unflatten(-1, (count, -1)).clone()
            z[..., heads, :] = self.changed(z[..., heads, :], layer, heads)
            return (z.flatten(-2), *inputs[1:])

        handle: AbstractContextManager[Any] = arch.module(
            model, "o_proj", layer
        ).register_forward_pre_hook(change_heads)
        return handle
