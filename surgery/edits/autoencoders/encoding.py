"""How active each feature of an autoencoder is: the encoder, as its training had it.

Of an activation x, scaled by s and, where the format says so, less b_dec, with W_enc [d, n]:

- relu: f = relu(x·W_enc + b_enc);
- topk: the same, all but the k largest of a token zero (Gao et al., arXiv 2406.04093);
- jumprelu: the same where it is above a threshold, else zero (arXiv 2407.14435);
- gated: relu(exp(r_mag)·x·W_enc + b_mag) where x·W_enc + b_gate > 0, else zero (arXiv 2404.16014).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from surgery.edits.autoencoders.interface import Autoencoder
from surgery.errors import EditError, quote

GATES = ("b_gate", "b_mag", "r_mag")


@dataclass(frozen=True)
class Encoder:
    """Numbers of an autoencoder as float32 torch tensors.

    w_enc [d, n], w_dec [n, d], b_enc [n], b_dec [d] (zeros where the encoder does not subtract
    it); norms [n]: by what features are multiplied before they are compared; k: of top-k;
    threshold [n] or []: of jumprelu; gates: those of a gated one.
    """

    activation: str
    scale: float
    w_enc: Any
    w_dec: Any
    b_enc: Any
    b_dec: Any
    norms: Any
    k: int
    threshold: Any
    gates: Mapping[str, Any]

    def __call__(self, x: Any) -> Any:
        """Activations [..., n] of x [..., d] in the model's units."""
        return _ACTIVATIONS[self.activation](self, (self.scale * x - self.b_dec) @ self.w_enc)

    @property
    def rows(self) -> Any:
        """What a feature of activation 1 adds to x, in the model's units [n, d]."""
        return self.w_dec / self.scale


def read_encoder(sae: Autoencoder) -> Encoder:
    """The encoder of `sae`; raises `EditError` where its files do not say what it computes."""
    import torch

    if sae.activation not in _ACTIVATIONS:
        _refuse(sae, f"has the activation {quote(sae.activation)}; expected {', '.join(KNOWN)}")
    w_enc, w_dec = _matrix(sae, "W_enc"), _matrix(sae, "W_dec")
    # A decoder row of zeros writes nothing: what its feature reads is then no matter of size.
    norms = w_dec.norm(dim=1) if sae.by_norm else torch.ones(sae.latents)
    return Encoder(
        sae.activation,
        sae.scale("an encoder"),
        w_enc,
        w_dec,
        _tensor(sae.vector("b_enc")),
        _tensor(sae.vector("b_dec")) if sae.centered else torch.zeros(sae.width),
        norms,
        _active(sae),
        _tensor(_threshold(sae)),
        _gates(sae),
    )


def _relu(encoder: Encoder, read: Any) -> Any:
    import torch

    return torch.relu(read + encoder.b_enc)


def _topk(encoder: Encoder, read: Any) -> Any:
    import torch

    f = _relu(encoder, read)
    kept = (f * encoder.norms).topk(encoder.k, dim=-1).indices
    return torch.zeros_like(f).scatter(-1, kept, f.gather(-1, kept))


def _jumprelu(encoder: Encoder, read: Any) -> Any:
    f = _relu(encoder, read)
    return f * (f * encoder.norms > encoder.threshold)


def _gated(encoder: Encoder, read: Any) -> Any:
    import torch

    b_gate, b_mag, r_mag = (encoder.gates[name] for name in GATES)
    return torch.relu(read * r_mag.exp() + b_mag) * (read + b_gate > 0)


_ACTIVATIONS: dict[str, Callable[[Encoder, Any], Any]] = {
    "relu": _relu, "topk": _topk, "jumprelu": _jumprelu, "gated": _gated
}  # fmt: skip
KNOWN = tuple(_ACTIVATIONS)


def _active(sae: Autoencoder) -> int:
    """The k of top-k; 0 for others."""
    if sae.activation != "topk":
        return 0
    if sae.k is None or sae.k > sae.latents:
        _refuse(sae, f"is top-k with k {sae.k}; expected 1 to {sae.latents}")
    return sae.k


def _threshold(sae: Autoencoder) -> Any:
    if sae.activation != "jumprelu":
        return np.zeros(())
    if sae.threshold is not None:
        return np.array(sae.threshold)
    if "threshold" not in sae.tensors:
        _refuse(sae, "is jumprelu and has no threshold")
    return sae.vector("threshold")


def _gates(sae: Autoencoder) -> dict[str, Any]:
    if sae.activation != "gated":
        return {}
    missing = [name for name in GATES if name not in sae.tensors]
    if missing:
        _refuse(sae, f"is gated and has no {', '.join(missing)}")
    return {name: _tensor(sae.vector(name)) for name in GATES}


def _matrix(sae: Autoencoder, name: str) -> Any:
    if name not in sae.tensors:
        _refuse(sae, f"has no {name}")
    values = sae.tensors[name].single()
    if not np.isfinite(values).all():
        _refuse(sae, f"{name} holds NaN or infinities")
    return _tensor(values)


def _tensor(values: Any) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def _refuse(sae: Autoencoder, reason: str) -> NoReturn:
    raise EditError(f"{sae.path}: {reason}")
