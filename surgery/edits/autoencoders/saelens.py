"""SAELens: `cfg.json` and `sae_weights.safetensors`.

The hook point is `metadata.hook_name` (SAELens 6), or `hook_name` or `hook_point` (before it). A
scale that `normalize_activations` names and that is not folded in was measured on data and is in
no file.
"""

from __future__ import annotations

from typing import ClassVar

from surgery.edits.autoencoders.interface import Autoencoder, Folder, Format, stored

_TENSORS = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
_UNSCALED = (None, False, "none")


class SaeLens(Format):
    files: ClassVar[tuple[str, ...]] = ("cfg.json", "sae_weights.safetensors")

    def read(self, folder: Folder) -> Autoencoder:
        cfg, file = folder.config(self.files[0]), folder.weights(self.files[1])
        architecture = cfg.text("architecture") or "standard"
        cfg.refuse_transcoder("transcoder" in architecture or "W_skip" in file.tensors)
        plain = cfg.text("activation_fn_str") or cfg.text("activation_fn") or "relu"
        hook = cfg.text("metadata", "hook_name") or cfg.text("hook_name") or cfg.text("hook_point")
        sae = Autoencoder(
            file.path,
            stored(file, _TENSORS),
            plain if architecture == "standard" else architecture,
            hook,
            input_scale=1.0 if cfg.get("normalize_activations") in _UNSCALED else None,
            centered=cfg.get("apply_b_dec_to_input") is not False,
        )
        cfg.check_sizes(sae, ["d_sae"], ["d_in"])
        return sae
