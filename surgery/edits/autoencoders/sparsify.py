"""sparsify (EleutherAI): `cfg.json` and `sae.safetensors` in a folder named after a module.

The autoencoder reads that module's output. `encoder.weight` is [n, d] and `W_dec` [n, d] too:
both as the encoder's `torch.nn.Linear` has them.
"""

from __future__ import annotations

from typing import ClassVar

from surgery.edits.autoencoders.interface import Autoencoder, Folder, Format, stored

_TENSORS = {
    "W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"
}  # fmt: skip


class Sparsify(Format):
    files: ClassVar[tuple[str, ...]] = ("cfg.json", "sae.safetensors")

    def read(self, folder: Folder) -> Autoencoder:
        cfg = folder.config("cfg.json")
        file = folder.weights("sae.safetensors")
        activation = cfg.text("activation") or "topk"
        skips = bool(cfg.get("skip_connection")) or "W_skip" in file.tensors
        cfg.refuse_transcoder(bool(cfg.get("transcode")) or skips)
        sae = Autoencoder(
            file.path,
            stored(file, _TENSORS, transposed=("W_enc",)),
            activation,
            folder.parts[-1] if folder.parts else None,
            centered=True,
            k=cfg.count("k") if activation == "topk" else None,
        )
        cfg.check_sizes(sae, ["num_latents"], ["d_in"])
        return sae
