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

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
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
from surgery.edits.saelens import CONFIG, WEIGHTS, Sae, read_sae
from surgery.errors import EditError, RecipeError, quote

STREAM_HOOKS = (
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"
)  # fmt: skip
Z_HOOK = "attn.hook_z"

Vectors = NDArray[np.float64]


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
            _refuse_norms(arch, layers, whole)
        return Orthogonalize(basis(rows), self.strength, layers, whole)


def basis(rows: Vectors) -> Vectors:
    """An orthonormal basis [width, rank] of the span of `rows` [k, width], in float64.

    One basis, not one projection after another: the latter leaves part of the earlier rows.
    """
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    _, singular, right = np.linalg.svd(unit, full_matrices=False)
    rank = int((singular > 1e-10 * singular[0]).sum())
    return np.array(right[:rank].T, np.float64, order="C")


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
            f"{sae.weights.parent}: hooks {quote(sae.hook)}; {patch} on {arch.family} needs one of "
            f"{', '.join(expected)}"
        )
    if sae.layer >= arch.layers:
        raise EditError(
            f"{sae.weights.parent}: hooks layer {sae.layer}; this model has layers 0 to "
            f"{arch.layers - 1}"
        )
    width = arch.sizes["z_width"] if sae.hook == Z_HOOK else arch.width
    if sae.width != width:
        raise EditError(
            f"{sae.weights.parent}: has width {sae.width}; this model has {width} at {sae.hook}"
        )


def _refuse_norms(arch: Architecture, layers: tuple[int, ...], embeddings: bool) -> None:
    """Raises `EditError` where something rescales what a matrix writes."""
    for writer in arch.writers(layers, embeddings):
        if writer.norm is not None:
            raise EditError(
                f"orthogonalize is not exact on {arch.family}, which normalises what "
                f"{quote(writer.tensor)} writes; say approximate: true to do it all the same"
            )


@dataclass(frozen=True)
class Orthogonalize(Edit):
    """What each writer in `layers` (with `embeddings`, those too) adds loses its part in Q."""

    op: ClassVar[str] = "sae"
    q: Vectors
    strength: float
    layers: tuple[int, ...]
    embeddings: bool

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        writers = arch.writers(self.layers, self.embeddings)
        return tuple(
            Target(Region.whole(w.tensor, tensors[w.tensor].shape), "output") for w in writers
        )

    def prepare(self, arch: Architecture, reader: Reader) -> dict[str, Vectors | None]:
        writers = arch.writers(self.layers, self.embeddings)
        return {w.tensor: _along_rows(w.tensor, self.q, w.axis, reader) for w in writers}

    def transform(self, slab: Array, where: Region, state: dict[str, Vectors | None]) -> Array:
        return project(slab, self.q, self.strength, where, state[where.tensor])

    def factors(
        self, slab: Array, where: Region, state: dict[str, Vectors | None]
    ) -> Factors | None:
        if slab.ndim != 2:
            return None
        return projection(slab, self.q, self.strength, where, state[where.tensor])

    @contextmanager
    def hook(self, model: Any, arch: Architecture, state: Any) -> Iterator[None]:
        writers = {(arch.roles[w].role, arch.roles[w].layer) for w in state}
        with ExitStack() as stack:
            for role, layer in writers:
                module = arch.module(model, role, layer)
                stack.enter_context(module.register_forward_hook(self._project_output))
            yield

    def _project_output(self, module: Any, inputs: Any, output: Any) -> Any:
        return _project_torch(output, self.q, self.strength)


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
        return _along_rows(tensor, self.q, arch.input_axis("o_proj"), reader)

    def transform(self, slab: Array, where: Region, state: Vectors | None) -> Array:
        return project(slab, self.q, self.strength, where, state)

    def factors(self, slab: Array, where: Region, state: Vectors | None) -> Factors | None:
        if slab.ndim != 2:
            return None
        return projection(slab, self.q, self.strength, where, state)

    def hook(self, model: Any, arch: Architecture, state: Any) -> AbstractContextManager[None]:
        def project_input(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (_project_torch(inputs[0], self.q, self.strength), *inputs[1:])

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
            f"{sae.weights.parent}: normalises its input, so its decoder is not in the model's "
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


def project(
    slab: Array, q: Vectors, strength: float, where: Region, along_rows: Vectors | None
) -> Array:
    """`slab` less `strength` times its part along `q` [width, rank], in slab's dtype.

    The width runs along the last axis of the tensor, or along its rows if `along_rows` = qᵀW
    [rank, …] of the whole tensor is given, of which `slab` is the part `where`.
    """
    if strength == 0:
        return slab
    left, right = projection(slab, q, strength, where, along_rows)
    changed = left @ right
    np.add(slab, changed, out=changed)
    return changed.astype(slab.dtype)


def projection(
    slab: Array, q: Vectors, strength: float, where: Region, along_rows: Vectors | None
) -> Factors:
    """What `project` adds to `slab`, as factors.

    In float64, so that the sums come out the same whatever the bands and the BLAS: who verifies
    on another machine must find the same numbers.
    """
    if along_rows is None:
        return slab.astype(np.float64) @ q, -strength * q.T
    return -strength * q[where.slices[0]], along_rows[(slice(None), *where.slices[1:])]


def _along_rows(tensor: str, q: Vectors, axis: int, reader: Reader) -> Vectors | None:
    """qᵀW [rank, …] where the width runs along the rows (`axis` 0), else None.

    One read of the tensor: a band of rows alone does not know the part along q.
    """
    if axis != 0:
        return None
    total: Any = 0.0
    for band, slab in reader.rows(tensor):
        total = total + q[band].T @ slab
    return np.asarray(total, np.float64)


def _project_torch(x: Any, q: Vectors, strength: float) -> Any:
    basis_ = _like(q, x)
    return x - strength * ((x @ basis_) @ basis_.T)


def _add_torch(x: Any, vector: Vectors) -> Any:
    return x + _like(vector, x)


def _like(values: Vectors, tensor: Any) -> Any:
    """`values` as a torch tensor of the dtype and device of `tensor`."""
    import torch

    return torch.from_numpy(values).to(tensor)


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
