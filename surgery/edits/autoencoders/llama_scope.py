"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`.

Trained on activations scaled to norm √d on average: x·√d / dataset_average_activation_norm.in,
and giving them back scaled by `.out`, which is the same for an autoencoder. `none` and `inference`
mean that nothing is scaled (any more); other ways of normalising are of each token or batch, so
that no number undoes them. `jump_relu_threshold` is for activations that are not scaled, and for
decoder rows of norm 1, which the format's own loader makes them; one above zero is what replaces
top-k once training is over.
"""

from __future__ import annotations

import math
from typing import ClassVar

from surgery.edits.autoencoders.interface import Autoencoder, Config, Folder, Format, stored
from surgery.errors import CheckpointError, quote

_TENSORS = {
    "W_enc": "encoder.weight", "b_enc": "encoder.bias",
    "W_dec": "decoder.weight", "b_dec": "decoder.bias",
}  # fmt: skip
_NORMS = "dataset_average_activation_norm"


class LlamaScope(Format):
    files: ClassVar[tuple[str, ...]] = ("hyperparams.json", "checkpoints/final.safetensors")

    def read(self, folder: Folder) -> Autoencoder:
        config, file = folder.config(self.files[0]), folder.weights(self.files[1])
        hook = config.text("hook_point_in")
        config.refuse_transcoder(config.text("hook_point_out") not in (None, hook))
        tensors = stored(file, _TENSORS, transposed=("W_enc", "W_dec"))
        scale = _scale(config, tensors["W_dec"].shape[-1])
        jumps = bool(config.get("jump_relu_threshold"))
        activation = "jumprelu" if jumps else config.text("act_fn") or "relu"
        sae = Autoencoder(
            file.path,
            tensors,
            activation,
            hook,
            input_scale=scale,
            threshold=config.number("jump_relu_threshold") * (scale or 1) if jumps else None,
            centered=config.get("apply_decoder_bias_to_pre_encoder") is True,
            k=config.count("top_k") if activation == "topk" else None,
            by_norm=True,
        )
        config.check_sizes(sae, ["d_sae"], ["d_model"])
        return sae


def _scale(config: Config, width: int) -> float | None:
    how = config.text("norm_activation") or "dataset-wise"
    if how != "dataset-wise":
        return 1.0 if how in ("none", "inference") else None
    norm = config.number(_NORMS, "in")
    if config.get(_NORMS, "out") not in (None, norm):
        raise CheckpointError(
            f"{config.path}: {_NORMS}.out is {quote(config.get(_NORMS, 'out'))}, .in is {norm}; "
            "expected one norm of the one activation"
        )
    return math.sqrt(width) / norm
