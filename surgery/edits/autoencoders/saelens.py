"""SAELens: `cfg.json` and `sae_weights.safetensors`.

The hook point is `metadata.hook_name` (SAELens 6), or `hook_name` or `hook_point` (before it). A
scale that `normalize_activations` names and that is not folded in was measured on data and is in
no file. A transcoder (`architecture: transcoder`) names what it writes in `hook_name_out` and has a
b_dec of that, which its encoder never subtracts; one with a skip connection is refused.
"""

from __future__ import annotations

from typing import ClassVar

from surgery.edits.autoencoders.interface import Autoencoder, Config, Folder, Format, stored

_FRAME = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "b_gate", "b_mag", "r_mag")
_TENSORS = {name: name for name in _FRAME}
_UNSCALED = (None, False, "none")


class SaeLens(Format):
    files: ClassVar[tuple[str, ...]] = ("cfg.json", "sae_weights.safetensors")

    def read(self, folder: Folder) -> Autoencoder:
        cfg, file = folder.config(self.files[0]), folder.weights(self.files[1])
        architecture = cfg.text("architecture") or "standard"
        cfg.refuse_transcoder(architecture == "skip_transcoder" or "W_skip" in file.tensors)
        writes = _writes(cfg) if architecture.endswith("transcoder") else None
        architecture = architecture.removesuffix("transcoder").rstrip("_") or "standard"
        plain = cfg.text("activation_fn_str") or cfg.text("activation_fn") or "relu"
        activation = plain if architecture == "standard" else architecture
        hook = cfg.text("metadata", "hook_name") or cfg.text("hook_name") or cfg.text("hook_point")
        sae = Autoencoder(
            file.path,
            stored(file, _TENSORS),
            activation,
            hook,
            input_scale=1.0 if cfg.get("normalize_activations") in _UNSCALED else None,
            centered=writes is None and cfg.get("apply_b_dec_to_input") is not False,
            writes=writes,
            k=_active(cfg) if activation == "topk" else None,
            by_norm=cfg.get("rescale_acts_by_decoder_norm") is True,
        )
        cfg.check_sizes(sae, ["d_sae"], ["d_in"])
        return sae


def _active(cfg: Config) -> int | None:
    """How many features are active on a token (before SAELens 6: an argument of the function)."""
    return cfg.count("k") or cfg.count("activation_fn_kwargs", "k")


def _writes(cfg: Config) -> str:
    return cfg.text("hook_name_out") or cfg.text("metadata", "hook_name_out") or ""
