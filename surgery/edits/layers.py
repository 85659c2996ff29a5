"""`layers`: scale what a block writes to the residual stream; 0 removes it.

`part: attn` scales the output projection of attention, `mlp` that of the MLP, biases included; of
experts, that of each. Where what a block gives is normalised before it is added (Gemma 2 and 3),
the norm undoes every factor but 0, which an RMSNorm keeps.
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
from surgery.errors import EditError

Part = Literal["attn", "mlp", "both"]


class LayersFields(Fields):
    """`{op: layers, layers: [7], factor: 0.0, part: mlp}`; `part` is `attn`, `mlp` or `both`."""

    op: Literal["layers"]
    layers: str | list[NonNegativeInt]
    factor: float = 0.0
    part: Part = "both"

    def build(self, arch: Architecture, files: RecipeFiles) -> LayersEdit:
        if _normalised(arch) and self.factor not in (0, 1):
            raise EditError(
                f"layers with factor {self.factor} does nothing it says on {arch.family}, which "
                "normalises what a block gives before adding it; factor 0 removes it"
            )
        return LayersEdit(parse_layers(self.layers, arch.layers), self.factor, self.part)


def _normalised(arch: Architecture) -> bool:
    """Whether a norm alone lies between what a block gives and the stream it is added to."""
    return arch.facts.norms == "both"


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
                # What is added to the stream: past the norm, where that is all that follows.
                norm = arch.facts.modules[role].norm if _normalised(arch) else None
                module = arch.module(model, norm or role, layer)
                stack.enter_context(module.register_forward_hook(self._scale_output))
            yield

    def _scale_output(self, module: Any, inputs: Any, output: Any) -> Any:
        return self.factor * output
