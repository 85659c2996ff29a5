"""Gemma Scope 2: `config.json` and `params.safetensors`, JumpReLU in the model's own units.

The config names the module whose input or output is read: `model.layers.9.output`. Where it does
not, the folder does: `resid_post/layer_9_width_16k_l0_small`.
"""

from __future__ import annotations

import re
from typing import ClassVar

from surgery.edits.autoencoders.interface import Autoencoder, Folder, Format, stored

_TENSORS = {
    "W_enc": "w_enc", "b_enc": "b_enc", "W_dec": "w_dec", "b_dec": "b_dec",
    "threshold": "threshold",
}  # fmt: skip
_SITES = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "attn.hook_z"}


class GemmaScope2(Format):
    files: ClassVar[tuple[str, ...]] = ("config.json", "params.safetensors")

    def read(self, folder: Folder) -> Autoencoder:
        config = folder.config("config.json")
        file = folder.weights("params.safetensors")
        writes = config.text("hf_hook_point_out")
        reads = config.text("hf_hook_point_in")
        skips = "affine_skip_connection" in file.tensors
        config.refuse_transcoder(skips or writes not in (None, "", reads))
        hook = reads or _hook(folder)
        return Autoencoder(file.path, stored(file, _TENSORS), "jumprelu", hook)


def _hook(folder: Folder) -> str | None:
    """The hook point by the names of the two innermost folders."""
    site, name = ("", "", *folder.parts)[-2:]
    layer = re.match(r"layer_(\d{1,6})(_|$)", name)
    return f"blocks.{layer[1]}.{_SITES[site]}" if layer and site in _SITES else None
