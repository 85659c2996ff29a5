"""`layers`: scale what a block writes to the residual stream; 0 removes it.

`part: attn` scales the output projection of attention, `mlp` that of the MLP, biases included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeInt

from surgery.addresses import Region, parse_layers
from surgery.arch import Architecture, Role
from surgery.checkpoint import TensorInfo
from surgery.edits.interface import Array, Edit, Fields, RecipeFiles, Target
from surgery.edits.scale import scale

Part = Literal["attn", "mlp", "both"]


class LayersFields(Fields):
    """`{op: layers, layers: [7], factor: 0.0, part: mlp}`; `part` is `attn`, `mlp` or `both`."""

    op: Literal["layers"]
    layers: str | list[NonNegativeInt]
    factor: float = 0.0
    part: Part = "both"

    def build(self, arch: Architecture, files: RecipeFiles) -> LayersEdit:
        return LayersEdit(parse_layers(self.layers, arch.layers), self.factor, self.part)


@dataclass(frozen=True)
class LayersEdit(Edit):
    """y ↦ factor · y for what attention, the MLP or both add in each of `layers`."""

    op: ClassVar[str] = "layers"
    layers: tuple[int, ...]
    factor: float
    part: Part

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        return tuple(
            Target(Region.whole(tensor, tensors[tensor].shape), "output")
            for tensor, _ in self._writers(arch)
        )

    def _writers(self, arch: Architecture) -> Iterator[tuple[str, Role]]:
        for writer in arch.writers(self.layers, outside_blocks=False):
            role = arch.roles[writer.tensor]
            part = "attn" if role.role == "o_proj" else "mlp"
            if self.part in (part, "both"):
                yield writer.tensor, role

    def transform(self, slab: Array, where: Region, state: None) -> Array:
        return scale(slab, self.factor)

    @contextmanager
    def hook(self, model: Any, arch: Architecture, state: None) -> Iterator[None]:
        with ExitStack() as stack:
            for role, layer in {(role.role, role.layer) for _, role in self._writers(arch)}:
                module = arch.module(model, role, layer)
                stack.enter_context(module.register_forward_hook(self._scale_output))
            yield

    def _scale_output(self, module: Any, inputs: Any, output: Any) -> Any:
        return self.factor * output
