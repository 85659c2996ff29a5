"""`sae` with `patch: steer_bias`: a vector added at a hook point, held by a bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from surgery.addresses import Region
from surgery.arch import Architecture, BiasSlot
from surgery.checkpoint import TensorInfo
from surgery.edits.autoencoders.hooks import Point
from surgery.edits.biases import add, flagged, through
from surgery.edits.interface import Array, Edit, Layout, Reader, Target
from surgery.edits.projection import Vectors, like
from surgery.errors import EditError

Z_SITE = "attn.hook_z"


@dataclass(frozen=True)
class SteerBias(Edit):
    """x ↦ x + vector at hook point `point`, as a bias at `slot`.

    With `through`, the vector lives before that projection and reaches the bias through it.
    """

    op: ClassVar[str] = "sae"
    vector: Vectors
    point: Point
    slot: BiasSlot
    through: str | None

    def layout(self, arch: Architecture) -> Layout:
        return flagged(arch, [self.slot])

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        shape = tensors[self.slot.tensor].shape
        return (Target(Region.whole(self.slot.tensor, shape), "value"),)

    def prepare(self, arch: Architecture, reader: Reader) -> Vectors:
        if self.through is None:
            return self.vector
        return through(arch, self.through, self.point.layer, self.vector, reader)

    def transform(self, slab: Array, where: Region, state: Vectors) -> Array:
        return add(slab, state[where.slices])

    def hook(self, model: Any, arch: Architecture, state: Any) -> AbstractContextManager[None]:
        def before(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (_add_torch(inputs[0], self.vector), *inputs[1:])

        def after(module: Any, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (_add_torch(output[0], self.vector), *output[1:])
            return _add_torch(output, self.vector)

        return _at_hook_point(model, arch, self.point, before, after)


def steer(point: Point, arch: Architecture, vector: Vectors) -> SteerBias:
    """The edit that adds `vector`, in the model's units, at `point`.

    Raises `EditError` where no bias can hold it.
    """
    fact = arch.facts.steer[point.site]
    layer: int | None = point.layer + fact.layer
    role = fact.role
    if point.layer + fact.layer < 0:
        role, layer = fact.first or "", None
    slot = arch.bias_slot(role, layer) if role else None
    if slot is None:
        raise EditError(
            f"{arch.family} has no bias at {point}, so no weight can hold this steering"
        )
    return SteerBias(vector, point, slot, fact.through)


def _add_torch(x: Any, vector: Vectors) -> Any:
    return x + like(vector, x)


def _at_hook_point(
    model: Any,
    arch: Architecture,
    point: Point,
    before: Callable[..., Any],
    after: Callable[..., Any],
) -> AbstractContextManager[None]:
    """Registers `before` or `after`, whichever acts on the activation TransformerLens names."""
    handle: AbstractContextManager[None]
    if point.site == Z_SITE:
        handle = arch.module(model, "o_proj", point.layer).register_forward_pre_hook(before)
    elif point.site == "hook_resid_pre":
        handle = arch.block(model, point.layer).register_forward_pre_hook(before)
    elif point.site == "hook_resid_post":
        handle = arch.block(model, point.layer).register_forward_hook(after)
    else:
        role = arch.facts.steer[point.site].role
        handle = arch.module(model, role, point.layer).register_forward_hook(after)
    return handle
