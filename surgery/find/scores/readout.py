"""The final norm and the head as a map of parts of the residual stream to logits.

With the variance of the model's own final state, a norm is a linear map (and a constant): y = w·s·x
of an RMS norm, y = w·s·(x − mean x) + b of a LayerNorm, s = (variance + ε)^-½. The mean is linear
in x already and so is each part's own; only the variance is frozen.
"""

from __future__ import annotations

from typing import Any

from surgery.arch import Architecture
from surgery.errors import FindError

TOLERANCE = 1e-3
"""How far logits read here may be from the model's own, as a share of the largest: float32 noise is
a hundredth of it."""


class FrozenNorm:
    """A norm of a live model, with the variance of another input; tensors are [..., width]."""

    def __init__(self, norm: Any, arch: Architecture) -> None:
        self._weight = norm.weight.detach() + arch.facts.norm_offset
        self._eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        self._centres = arch.facts.norm == "layer"
        self.bias = getattr(norm, "bias", None)

    def scale(self, state: Any) -> Any:
        """s of the `state` whose variance is frozen, [..., 1]."""
        return (self._centred(state).square().mean(-1, keepdim=True) + self._eps).rsqrt()

    def direction(self, part: Any) -> Any:
        """What the norm makes of a part of its input, but for s and the bias."""
        return self._centred(part) * self._weight

    def pulled_back(self, slope: Any) -> Any:
        """Of a slope by what the norm gives, that by its input, but for s: `direction` transposed,
        for taking the mean off is its own transpose."""
        return self._centred(slope * self._weight)

    def _centred(self, x: Any) -> Any:
        return x - x.mean(-1, keepdim=True) if self._centres else x


class Readout:
    """Logits of a decoder from parts of the stream: `finish(constant + s · directions(part))`."""

    def __init__(self, model: Any, arch: Architecture) -> None:
        if "final_norm" not in arch.facts.modules:
            raise FindError(
                f"{arch.family}: this model has no norm before its head, and attribution reads the "
                "stream through one; use method gradient or ablation"
            )
        self.norm = FrozenNorm(arch.module(model, "final_norm"), arch)
        self._head = model.get_output_embeddings()
        self._cap = getattr(model.config, "final_logit_softcapping", None)
        self._family = arch.family

    @property
    def vocab(self) -> int:
        return int(self._head.weight.shape[0])

    @property
    def constant(self) -> Any:
        """What the logits have whatever the stream holds, [vocab]."""
        bias, norm = getattr(self._head, "bias", None), self.norm.bias
        found = self._head.weight.new_zeros(self.vocab) if bias is None else bias
        return found if norm is None else found + self._head.weight @ norm

    def directions(self, parts: Any) -> Any:
        """Logits per unit of s that parts [n, width] of the stream add, [n, vocab]."""
        return self.norm.direction(parts) @ self._head.weight.T

    def finish(self, logits: Any) -> Any:
        """The soft cap of families that have one."""
        return logits if self._cap is None else (logits / self._cap).tanh() * self._cap

    def check(self, final: Any, logits: Any) -> None:
        """Raises `FindError` where the final states [n, width] are not read as the model's own
        `logits` [n, vocab]: then the family's head does more than is known here."""
        read = self.finish(self.constant + self.norm.scale(final) * self.directions(final))
        if not bool((read - logits).abs().max() <= TOLERANCE * logits.abs().max()):
            raise FindError(
                f"{self._family}: the final norm and the head alone do not give this model's "
                "logits, so attribution cannot read them; use method gradient or ablation"
            )
