"""Gemma Scope: `layer_L/width_W/average_l0_X/params.npz`, JumpReLU in the model's own units.

No file names the hook point. The folder names the layer and the repository around it the site:
`gemma-scope-2b-pt-res` is the residual stream after the block, `-mlp` what the MLP writes, `-att`
the concatenated heads.
"""

from __future__ import annotations

import re
from typing import ClassVar

from surgery.edits.autoencoders.interface import Autoencoder, Folder, Format, stored
from surgery.edits.autoencoders.npz import open_npz
from surgery.errors import EditError

_TENSORS = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
_SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}


class GemmaScope(Format):
    files: ClassVar[tuple[str, ...]] = ("params.npz",)

    def read(self, folder: Folder) -> Autoencoder:
        file, transposed = open_npz(folder.path("params.npz"))
        layer = _named(r"layer_(\d{1,6})", folder)
        site = _named(r"gemma-scope-\w+-\w+-(\w+)", folder)
        if site == "transcoders":
            raise EditError(f"{file.path}: is a transcoder; expected an autoencoder")
        known = layer is not None and site in _SITES
        return Autoencoder(
            file.path,
            stored(file, _TENSORS, transposed),
            "jumprelu",
            f"blocks.{layer}.{_SITES[str(site)]}" if known else None,
            None if layer is None else int(layer),
        )


def _named(pattern: str, folder: Folder) -> str | None:
    """What the innermost folder whose whole name is like `pattern` says."""
    matches = [re.fullmatch(pattern, part) for part in reversed(folder.parts)]
    return next((match[1] for match in matches if match), None)
