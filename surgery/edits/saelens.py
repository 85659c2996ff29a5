"""Sparse autoencoders on disk in SAELens format, read from the header and the rows asked for.

A folder holds `cfg.json` and `sae_weights.safetensors` with `W_dec` of shape [n, d] among its
tensors. The hook point is `metadata.hook_name` (SAELens 6) or `hook_name` (before it).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint import TensorFile
from surgery.checkpoint.files import parse_json_object, read_small
from surgery.errors import CheckpointError, EditError, quote

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"

_HOOK = re.compile(r"blocks\.(\d{1,6})\.([A-Za-z0-9_.]+)")


@dataclass(frozen=True)
class Sae:
    """The frame of one autoencoder: `latents` features of `width` numbers at a hook point."""

    file: TensorFile
    latents: int
    width: int
    layer: int
    hook: str
    normalized: bool

    @property
    def folder(self) -> Path:
        return self.file.path.parent

    def decoder_rows(self, features: Sequence[int]) -> NDArray[np.float64]:
        """W_dec[features] as float64 [len(features), width].

        Raises `EditError` for a feature that does not exist or whose row is zero or not finite.
        """
        rows = np.stack([self._row(feature) for feature in features])
        norms = np.linalg.norm(rows, axis=1)
        for feature, norm in zip(features, norms, strict=True):
            if not np.isfinite(norm) or norm == 0:
                raise EditError(f"{self.file.path}: decoder row {feature} has norm {norm}")
        return rows

    def _row(self, feature: int) -> NDArray[np.float64]:
        if not 0 <= feature < self.latents:
            raise EditError(
                f"{self.file.path}: feature {feature} is out of range 0 to {self.latents - 1}"
            )
        row: NDArray[np.float64] = self.file.rows("W_dec", feature, feature + 1)[0].astype(float)
        return row


def read_sae(config: Path, weights: Path) -> Sae:
    """The autoencoder of one folder; raises `CheckpointError` for a malformed one."""
    fields = parse_json_object(read_small(config), str(config))
    file = TensorFile.open(weights)
    decoder = file.info("W_dec")
    if len(decoder.shape) != 2:
        raise CheckpointError(
            f"{weights}: W_dec has shape {list(decoder.shape)}; expected [latents, width]"
        )
    layer, hook = _hook_point(fields, config)
    latents, width = decoder.shape
    declared = (fields.get("d_sae", latents), fields.get("d_in", width))
    if declared != (latents, width):
        raise CheckpointError(
            f"{config}: says {quote(declared)}, W_dec has shape {(latents, width)}"
        )
    normalized = fields.get("normalize_activations", "none") not in ("none", None)
    return Sae(file, latents, width, layer, hook, normalized)


def _hook_point(fields: dict[str, Any], config: Path) -> tuple[int, str]:
    metadata = fields.get("metadata")
    name = metadata.get("hook_name") if isinstance(metadata, dict) else None
    name = name or fields.get("hook_name")
    match = _HOOK.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise CheckpointError(
            f"{config}: hook_name is {quote(name)}; expected one like blocks.3.hook_resid_post"
        )
    return int(match[1]), match[2]
