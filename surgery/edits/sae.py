"""`sae`: remove or add features of a sparse autoencoder, as weights.

With W_dec[i] the decoder row of feature i and Q an orthonormal basis of the chosen rows:

- `orthogonalize`: everything that writes to the residual stream loses its part along Q,
  Linear W − s·QQᵀW; Conv1D, embeddings and biases W − s·WQQᵀ. The oracle projects what each
  block writes. Exact where nothing rescales between the matrix and the stream.
- `z_project`: for an autoencoder on concatenated head outputs z (Kissane et al., 2024), the
  output projection stops reading Q: Linear W(I − s·QQᵀ), Conv1D (I − s·QQᵀ)W.
- `steer_bias`: x ↦ x + s·Σ W_dec[i] at the autoencoder's hook point, held by a bias.

Projection is unconditional: it is not the ablation of a feature only where it is active.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeInt

from surgery.addresses import Region, parse_layers
from surgery.arch import Architecture, BiasSlot
from surgery.checkpoint import TensorInfo
from surgery.checkpoint.delta import Factors
from surgery.edits.interface import (
    Addition,
    Array,
    Edit,
    Fields,
    Layout,
    Reader,
    RecipeFiles,
    Target,
)
from surgery.edits.projection import (
    OutputProjection,
    Vectors,
    along_rows,
    basis,
    like,
    project,
    project_torch,
    projection,
    refuse_inexact,
)
from surgery.edits.saelens import CONFIG, WEIGHTS, Sae, read_sae
from surgery.errors import EditError, RecipeError, quote

STREAM_HOOKS = (
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"
)  # fmt: skip
Z_HOOK = "attn.hook_z"


class SaeFields(Fields):
    """`{op: sae, sae: sae/, features: [12], patch: orthogonalize, strength: 1.0}`.

    `layers` and `approximate` go with `orthogonalize` only; `center` removes the mean of each
    decoder row first, which a LayerNorm would remove anyway.
    """

    op: Literal["sae"]
    sae: str
    features: Annotated[list[NonNegativeInt], Field(min_length=1)]
    patch: Literal["orthogonalize", "z_project", "steer_bias"] = "orthogonalize"
    strength: float = 1.0
    layers: str | list[NonNegativeInt] | None = None
    approximate: bool = False
    center: bool = False

    def build(self, arch: Architecture, files: RecipeFiles) -> Edit:
        if len(set(self.features)) != len(self.features):
            raise RecipeError("a feature is named twice")
        if self.patch != "orthogonalize" and (self.layers is not None or self.approximate):
            raise RecipeError(f"layers and approximate have no meaning with patch {self.patch}")
        folder = self.sae.rstrip("/")
        sae = read_sae(files.path(f"{folder}/{CONFIG}"), files.path(f"{folder}/{WEIGHTS}"))
        _check_hook(sae, arch, self.patch)
        rows = sae.decoder_rows(self.features)
        if self.center:
            rows = _centered(rows)
        if self.patch == "steer_bias":
            with np.errstate(over="ignore", invalid="ignore"):  # refused where it lands
                return _steer(sae, arch, self.strength * rows.sum(axis=0))
        if self.patch == "z_project":
            return ZProject(basis(rows), self.strength, sae.layer)
        whole = self.layers in (None, "all")
        layers = parse_layers("all" if self.layers is None else self.layers, arch.layers)
        if not self.approximate:
            refuse_inexact("orthogonalize", arch, arch.writers(layers, whole))
        return Orthogonalize(basis(rows), self.strength, layers, whole)


def _centered(rows: Vectors) -> Vectors:
    """`rows` [k, width] less the mean of each; raises `EditError` where nothing is left."""
    centered: Vectors = rows - rows.mean(axis=1, keepdims=True)
    left = np.linalg.norm(centered, axis=1) / np.linalg.norm(rows, axis=1)
    if left.min() < 1e-10:
        raise EditError("a decoder row is constant, so center: true leaves nothing of it")
    return centered


def _check_hook(sae: Sae, arch: Architecture, patch: str) -> None:
    hooks = {"orthogonalize": STREAM_HOOKS, "z_project": (Z_HOOK,)}
    expected = hooks.get(patch, tuple(arch.facts.steer))
    if not expected:
        raise EditError(f"{arch.family} has no bias that could hold this steering")
    if sae.hook not in expected:
        raise EditError(
            f"{sae.folder}: hooks {quote(sae.hook)}; {patch} on {arch.family} needs one of "
            f"{', '.join(expected)}"
        )
    if sae.layer >= arch.layers:
        raise EditError(
            f"{sae.folder}: hooks layer {sae.layer}; this model has layers 0 to {arch.layers - 1}"
        )
    width = arch.sizes["z_width"] if sae.hook == Z_HOOK else arch.width
    if sae.width != width:
        raise EditError(
            f"{sae.folder}: has width {sae.width}; this model has {width} at {sae.hook}"
        )


@dataclass(frozen=True)
class Orthogonalize(OutputProjection):
    """The decoder rows leave everything that writes to the stream."""

    op: ClassVar[str] = "sae"


@dataclass(frozen=True)
class ZProject(Edit):
    """z ↦ z − s·QQᵀz before the output projection of one layer."""

    op: ClassVar[str] = "sae"
    q: Vectors
    strength: float
    layer: int

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        tensor = arch.name("o_proj", self.layer)
        return (Target(Region.whole(tensor, tensors[tensor].shape), "input"),)

    def prepare(self, arch: Architecture, reader: Reader) -> Vectors | None:
        tensor = arch.name("o_proj", self.layer)
        return along_rows(tensor, self.q, arch.input_axis("o_proj"), reader)

    def transform(self, slab: Array, where: Region, state: Vectors | None) -> Array:
        return project(slab, self.q, self.strength, where, state)

    def factors(self, slab: Array, where: Region, state: Vectors | None) -> Factors | None:
        if slab.ndim != 2:
            return None
        return projection(slab, self.q, self.strength, where, state)

    def hook(self, model: Any, arch: Architecture, state: Any) -> AbstractContextManager[None]:
        def project_input(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (project_torch(inputs[0], self.q, self.strength), *inputs[1:])

        module = arch.module(model, "o_proj", self.layer)
        handle: AbstractContextManager[None] = module.register_forward_pre_hook(project_input)
        return handle


@dataclass(frozen=True)
class SteerBias(Edit):
    """x ↦ x + vector at hook point `point` of `layer`, as a bias at `slot` (role, layer).

    With `through`, the vector lives before that projection and reaches the bias through it.
    """

    op: ClassVar[str] = "sae"
    vector: Vectors
    layer: int
    point: str
    slot: BiasSlot
    through: str | None

    def layout(self, arch: Architecture) -> Layout:
        key = self.slot.config_key
        if key is None:
            return Layout()
        added = tuple(
            Addition(name, shape, name.removesuffix("bias") + "weight")
            for name, shape in arch.flagged_biases(key)
        )
        return Layout(added, {key: True})

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        shape = tensors[self.slot.tensor].shape
        return (Target(Region.whole(self.slot.tensor, shape), "value"),)

    def prepare(self, arch: Architecture, reader: Reader) -> Vectors:
        if self.through is None:
            return self.vector
        if not self.vector.any():
            # Nothing moves, whatever the weights: 0 times a NaN of theirs would not be nothing.
            return np.zeros(arch.width)
        rows = reader.rows(arch.name(self.through, self.layer))
        if arch.input_axis(self.through) == 0:
            return sum((self.vector[band] @ slab for band, slab in rows), np.zeros(arch.width))
        return np.concatenate([slab @ self.vector for _, slab in rows])

    def transform(self, slab: Array, where: Region, state: Vectors) -> Array:
        added = state[where.slices]
        # -0.0 + 0.0 is +0.0, and adding nothing must change nothing.
        return np.where(added == 0, slab, slab + added).astype(slab.dtype)

    def hook(self, model: Any, arch: Architecture, state: Any) -> AbstractContextManager[None]:
        def before(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (_add_torch(inputs[0], self.vector), *inputs[1:])

        def after(module: Any, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (_add_torch(output[0], self.vector), *output[1:])
            return _add_torch(output, self.vector)

        return _at_hook_point(model, arch, self.point, self.layer, before, after)


def _steer(sae: Sae, arch: Architecture, vector: Vectors) -> SteerBias:
    if sae.normalized:
        raise EditError(
            f"{sae.folder}: normalises its input, so its decoder is not in the model's "
            "units; steer_bias needs normalize_activations: none"
        )
    fact = arch.facts.steer[sae.hook]
    layer: int | None = sae.layer + fact.layer
    role = fact.role
    if sae.layer + fact.layer < 0:
        role, layer = fact.first or "", None
    slot = arch.bias_slot(role, layer) if role else None
    if slot is None:
        raise EditError(
            f"{arch.family} has no bias at blocks.{sae.layer}.{sae.hook}, so no weight can hold "
            "this steering"
        )
    return SteerBias(vector, sae.layer, sae.hook, slot, fact.through)


def _add_torch(x: Any, vector: Vectors) -> Any:
    return x + like(vector, x)


def _at_hook_point(
    model: Any,
    arch: Architecture,
    point: str,
    layer: int,
    before: Callable[..., Any],
    after: Callable[..., Any],
) -> AbstractContextManager[None]:
    """Registers `before` or `after`, whichever acts on the activation TransformerLens names."""
    handle: AbstractContextManager[None]
    if point == Z_HOOK:
        handle = arch.module(model, "o_proj", layer).register_forward_pre_hook(before)
    elif point == "hook_resid_pre":
        handle = arch.block(model, layer).register_forward_pre_hook(before)
    elif point == "hook_resid_post":
        handle = arch.block(model, layer).register_forward_hook(after)
    else:
        role = arch.facts.steer[point].role
        handle = arch.module(model, role, layer).register_forward_hook(after)
    return handle
