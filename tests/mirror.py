"""A toy op, in one file as any: what the MLP of a layer writes changes its sign."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from surgery.addresses import Region
from surgery.arch import Architecture
from surgery.checkpoint import TensorInfo
from surgery.edits import Edit, Fields, RecipeFiles, Target
from surgery.edits.interface import Array


class MirrorFields(Fields):
    """`{op: mirror, layer: 1}`."""

    op: Literal["mirror"]
    layer: int

    def build(self, arch: Architecture, files: RecipeFiles) -> Mirror:
        return Mirror(self.layer)


@dataclass(frozen=True)
class Mirror(Edit):
    """y ↦ −y for what the down projection of a layer writes."""

    op: ClassVar[str] = "mirror"
    layer: int

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        return tuple(
            Target(Region.whole(name, tensors[name].shape), "output")
            for name, role in arch.roles.items()
            if (role.role, role.layer) == ("down_proj", self.layer)
        )

    def transform(self, slab: Array, where: Region, state: None) -> Array:
        return -slab

    def hook(self, model: Any, arch: Architecture, state: None) -> AbstractContextManager[Any]:
        module = arch.module(model, "down_proj", self.layer)
        handle: AbstractContextManager[Any] = module.register_forward_hook(
            lambda module, inputs, output: -output
        )
        return handle
