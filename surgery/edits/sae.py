"""`sae`: remove or add features of a sparse autoencoder, as weights.

With W_dec[i] the decoder row of feature i and Q an orthonormal basis of the chosen rows:

- `orthogonalize`: everything that writes to the residual stream loses its part along Q,
  Linear W − s·QQᵀW; Conv1D, embeddings and biases W − s·WQQᵀ. The oracle projects what each
  block writes. Exact where nothing rescales between the matrix and the stream.
- `z_project`: for an autoencoder on concatenated head outputs z (Kissane et al., 2024), the
  output projection stops reading Q: Linear W(I − s·QQᵀ), Conv1D (I − s·QQᵀ)W.
- `steer_bias`: x ↦ x + s·Σ W_dec[i] at the autoencoder's hook point, in the model's units, held
  by a bias.
- `rank1`: what blocks write is multiplied by I + s·Σ d_i·e_iᵀ, with d_i the decoder row scaled to
  norm 1 and e_i the encoder column in the model's units: Linear (I + s·DEᵀ)W; Conv1D, embeddings
  and biases W(I + s·EDᵀ). A linear approximation of a feature s times as strong: it drops the
  gate and the encoder's bias, so that the feature acts on every token, with either sign.
- `append_neuron`: a neuron more of an MLP for each feature, gated as the feature is, for an
  autoencoder of what that MLP reads: see `sae_neuron`.

Projection is unconditional: it is not the ablation of a feature only where it is active.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeInt

from surgery.addresses import parse_layers
from surgery.arch import Architecture
from surgery.edits.autoencoders import Autoencoder, opened
from surgery.edits.autoencoders.hooks import MLP_INPUT, Point, parse, point_of
from surgery.edits.autoencoders.interface import refuse_transcoder
from surgery.edits.interface import Edit, Fields, RecipeFiles
from surgery.edits.projection import Vectors, basis, refuse_inexact
from surgery.edits.sae_neuron import append
from surgery.edits.sae_projection import Orthogonalize, RankOne, ZProject
from surgery.edits.sae_steer import Z_SITE, steer
from surgery.errors import EditError, RecipeError, quote

STREAM_SITES = (
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"
)  # fmt: skip
ON_WRITERS = ("orthogonalize", "rank1")


class SaeFields(Fields):
    """`{op: sae, sae: sae/, features: [12], patch: orthogonalize, strength: 1.0}`.

    `layers` and `approximate` go with `orthogonalize` and `rank1` only; `center` removes the mean
    of each decoder row first, which a LayerNorm would remove anyway. `hook` is for folders that do
    not name their hook point; `pickle: true` reads an `ae.pt` in a child process.
    """

    op: Literal["sae"]
    sae: str
    features: Annotated[list[NonNegativeInt], Field(min_length=1)]
    patch: Literal["orthogonalize", "z_project", "steer_bias", "rank1", "append_neuron"] = (
        "orthogonalize"
    )
    strength: float = 1.0
    layers: str | list[NonNegativeInt] | None = None
    approximate: bool = False
    center: bool = False
    hook: str | None = None
    pickle: bool = False

    def build(self, arch: Architecture, files: RecipeFiles) -> Edit:
        if len(set(self.features)) != len(self.features):
            raise RecipeError("a feature is named twice")
        if self.patch not in ON_WRITERS and (self.layers is not None or self.approximate):
            raise RecipeError(f"layers and approximate have no meaning with patch {self.patch}")
        with opened(self.sae, files, pickle=self.pickle) as sae:
            point = point_of(sae, self.hook, arch)
            if sae.writes is not None:
                _check_writes(sae, sae.writes, point, arch, self.patch)
            _check_point(sae, point, arch, self.patch)
            rows = sae.decoder_rows(self.features)
            if self.center:
                rows = _centered(rows)
            if self.patch == "steer_bias":
                with np.errstate(over="ignore", invalid="ignore"):  # refused where it lands
                    vector = self.strength * rows.sum(axis=0) / sae.scale(self.patch)
                return steer(point, arch, vector)
            if self.patch == "append_neuron":
                return append(sae, self.features, rows, self.strength, point.layer, arch)
            if self.patch == "z_project":
                return ZProject(basis(rows), self.strength, point.layer)
            return self._on_writers(arch, sae, rows)

    def _on_writers(self, arch: Architecture, sae: Autoencoder, rows: Vectors) -> Edit:
        whole = self.layers in (None, "all")
        layers = parse_layers("all" if self.layers is None else self.layers, arch.layers)
        if not self.approximate:
            refuse_inexact(self.patch, arch, arch.writers(layers, whole))
        if self.patch == "orthogonalize":
            return Orthogonalize(basis(rows), self.strength, layers, whole)
        columns = sae.encoder_columns(self.features) * sae.scale(self.patch)
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return RankOne(columns.T.copy(), self.strength, layers, whole, units.T.copy())


def _centered(rows: Vectors) -> Vectors:
    """`rows` [k, width] less the mean of each; raises `EditError` where nothing is left."""
    centered: Vectors = rows - rows.mean(axis=1, keepdims=True)
    left = np.linalg.norm(centered, axis=1) / np.linalg.norm(rows, axis=1)
    if left.min() < 1e-10:
        raise EditError("a decoder row is constant, so center: true leaves nothing of it")
    return centered


def _check_writes(
    sae: Autoencoder, writes: str, point: Point, arch: Architecture, patch: str
) -> None:
    """Raises `EditError` for a transcoder of anything but the MLP that gains neurons."""
    if patch != "append_neuron":
        refuse_transcoder(sae.path)
    expected = Point(point.layer, "hook_mlp_out")
    if parse(writes, arch) != expected:
        raise EditError(
            f"{sae.path}: reads {point} and writes {quote(writes)}; a transcoder whose features "
            f"become neurons must write {expected}"
        )


def _check_point(sae: Autoencoder, point: Point, arch: Architecture, patch: str) -> None:
    sites = {
        "z_project": (Z_SITE,),
        "steer_bias": tuple(arch.facts.steer),
        "append_neuron": (MLP_INPUT,),
    }
    expected = sites.get(patch, STREAM_SITES)
    if not expected:
        raise EditError(f"{arch.family} has no bias that could hold this steering")
    if point.site not in expected:
        raise EditError(
            f"{sae.path}: hooks {quote(point.site)}; {patch} on {arch.family} needs one of "
            f"{', '.join(expected)}"
        )
    if point.layer >= arch.layers:
        raise EditError(
            f"{sae.path}: hooks layer {point.layer}; this model has layers 0 to {arch.layers - 1}"
        )
    width = arch.sizes["z_width"] if point.site == Z_SITE else arch.width
    if sae.width != width:
        raise EditError(
            f"{sae.path}: has width {sae.width}; this model has {width} at {point.site}"
        )
