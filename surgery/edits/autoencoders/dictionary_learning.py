"""dictionary_learning: `trainer_i/ae.pt`, a pickled state dict, and `config.json`.

Reading a pickle can run code. It is read only where the recipe says `pickle: true`, by
`torch.load(weights_only=True)`, which builds tensors and nothing else, in a child process with
limits; what it finds comes back as safetensors. Saved biases are in the model's own units.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import ClassVar

from surgery import process
from surgery.checkpoint import TensorFile
from surgery.edits.autoencoders.interface import Autoencoder, Config, Folder, Format, stored
from surgery.errors import CheckpointError, EditError, quote

_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_MATRICES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
_GATES = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
_BIASES = ("b_dec", "bias", "decoder_bias", "decoder.bias")
_ACTIVATIONS = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "jumprelu",
    "MatryoshkaBatchTopKSAE": "jumprelu",
}
"""By `dict_class`; batch top-k keeps what is above its threshold once it is trained."""
_UNCENTERED = ("AutoEncoderNew", "JumpReluAutoEncoder")
_SUBMODULE = re.compile(r"(resid_pre|resid_post|attn_out|mlp_out)_layer_(\d{1,6})")


class DictionaryLearning(Format):
    files: ClassVar[tuple[str, ...]] = ("config.json", "ae.pt")

    def read(self, folder: Folder) -> Autoencoder:
        config = folder.config("config.json")
        kind = config.text("trainer", "dict_class") or ""
        if kind not in _ACTIVATIONS:
            raise CheckpointError(
                f"{config.path}: trainer.dict_class is {quote(kind)}; "
                f"expected {', '.join(_ACTIVATIONS)}"
            )
        config.refuse_transcoder(config.get("buffer", "io") == "in_and_out")
        path = folder.path("ae.pt")
        file = _weights(folder, path)
        layer = config.get("trainer", "layer")
        sae = Autoencoder(
            path,
            stored(file, *_names(file)),
            _ACTIVATIONS[kind],
            _hook(config),
            layer if type(layer) is int else None,
            centered=kind not in _UNCENTERED,
            k=config.count("trainer", "k") if _ACTIVATIONS[kind] == "topk" else None,
        )
        config.check_sizes(sae, ["trainer", "dict_size"], ["trainer", "activation_dim"])
        return sae


def _weights(folder: Folder, path: Path) -> TensorFile:
    if not folder.pickle:
        raise EditError(
            f"{path}: is a pickle, which can run code when it is read; say pickle: true to "
            "read only its tensors, in a child process"
        )
    where = folder.stack.enter_context(tempfile.TemporaryDirectory(prefix="surgery-"))
    return unpickled(path, Path(where))


def unpickled(path: Path, folder: Path) -> TensorFile:
    """The float tensors of the pickled state dict at `path`, as safetensors in `folder`.

    Raises `CheckpointError` where it holds anything else or the child fails.
    """
    output = folder / "tensors.safetensors"
    work = {"path": str(path.resolve()), "output": str(output)}
    ending = process.run("surgery.edits.autoencoders.unpickle", work, folder, process.Limits())
    ending.value(str(path), CheckpointError)
    return TensorFile.open(output)


def _names(file: TensorFile) -> tuple[dict[str, str], tuple[str, ...]]:
    """The frame's names of what the file holds, and which of it is transposed."""
    if "W_dec" in file.tensors:
        return _MATRICES, ()
    bias = next((name for name in _BIASES if name in file.tensors), "b_dec")
    names = {**_LINEAR, **_GATES, "b_dec": bias, "threshold": "threshold"}
    return names, ("W_enc", "W_dec")


def _hook(config: Config) -> str | None:
    """The hook point, where the submodule's name follows the usual pattern."""
    match = _SUBMODULE.fullmatch(config.text("trainer", "submodule_name") or "")
    return f"blocks.{match[2]}.hook_{match[1]}" if match else None
