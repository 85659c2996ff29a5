"""What each feature of an autoencoder does: how active it is, and what taking it out would do.

Taking feature i out of an activation x keeps what the autoencoder does not explain (the error
term): x ↦ x − f_i·d_i, with its activation f_i and its decoder row d_i in the model's units. The
effect is the change of a logit difference m at the last position:

- attribution, to first order, −Σ_positions f_i·d_i·∂m/∂x (Syed et al., arXiv 2310.10348), or with
  the gradient's mean over `steps` points on the way to an activation without any feature, which is
  what Brinkmann et al. (arXiv 2501.06346) take from Marks et al. (arXiv 2403.19647), in 10 steps;
- direct: what f_i·d_i at the last position does to m through the final norm, its scale held, and
  the output head alone, before any cap of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from surgery.arch import Architecture
from surgery.edits.autoencoders.encoding import Encoder
from surgery.edits.autoencoders.hooks import Point
from surgery.errors import FindError
from surgery.find.prompts.rows import Inputs, is_real
from surgery.find.scores.hook_points import tapped
from surgery.find.scores.margins import Pairs, margins
from surgery.find.scores.readout import FrozenNorm

Z_SITE = "attn.hook_z"


@dataclass(frozen=True)
class Site:
    """An autoencoder at its place in a live transformers model."""

    model: Any
    arch: Architecture
    point: Point
    encoder: Encoder

    def read(self, inputs: Inputs) -> tuple[Any, Any]:
        """The activation x [batch, length, d] and its features [batch, length, n], which are zero
        where the batch is padded."""
        import torch

        kept: list[Any] = []

        def keep(x: Any) -> Any:
            kept.append(x.clone())
            return x

        with (
            torch.no_grad(),
            tapped(self.model, self.arch, self.point, is_real(inputs).shape, keep),
        ):
            self.model.base_model(**inputs, use_cache=False)
            features = self.encoder(kept[0])
        return kept[0], features * is_real(inputs)[..., None]

    def slope(self, inputs: Inputs, pairs: Pairs, x: Any) -> Any:
        """∂m/∂x [batch, length, d] where the activation is `x`."""
        import torch

        leaf = x.clone().requires_grad_()
        with (
            torch.enable_grad(),
            tapped(self.model, self.arch, self.point, is_real(inputs).shape, lambda _: leaf),
        ):
            total = margins(self.model, inputs, pairs).sum()
        return torch.autograd.grad(total, leaf)[0]


def attribution(site: Site, inputs: Inputs, pairs: Pairs, steps: int) -> tuple[Any, Any]:
    """Effects of taking each feature out [batch, n], and activations [batch, length, n]."""
    x, features = site.read(inputs)
    rows = site.encoder.rows
    explained = features @ rows
    slope = sum(site.slope(inputs, pairs, x - step / steps * explained) for step in range(steps))
    return -(features * (slope / steps @ rows.T)).sum(1), features


def direct(site: Site, inputs: Inputs, pairs: Pairs) -> tuple[Any, Any]:
    """The same through the final norm and the head alone."""
    import torch

    _, features = site.read(inputs)
    with torch.no_grad():
        wanted = _pulled_back(site, inputs, pairs)
        return -features[:, -1] * (wanted @ _written(site).T), features


def _written(site: Site) -> Any:
    """What a feature of activation 1 adds to the residual stream [n, width]."""
    rows, arch = site.encoder.rows, site.arch
    if site.point.site != Z_SITE:
        return rows
    if arch.facts.modules["o_proj"].norm:
        raise FindError(
            f"{arch.family} normalises what attention writes, so that a feature of {site.point} "
            "has no direct effect; use --method attribution"
        )
    o_proj = arch.module(site.model, "o_proj", site.point.layer)
    return o_proj(rows) - o_proj(rows.new_zeros(1, rows.shape[1]))


def _pulled_back(site: Site, inputs: Inputs, pairs: Pairs) -> Any:
    """The direction [batch, width] of the stream at the last position along which m rises."""
    arch = site.arch
    weight = site.model.get_output_embeddings().weight
    wanted = weight[pairs[0]] - weight[pairs[1]]
    if "final_norm" not in arch.facts.modules:
        return wanted
    module = arch.module(site.model, "final_norm")
    norm = FrozenNorm(module, arch)
    return norm.pulled_back(wanted) * norm.scale(_final(site, module, inputs))


def _final(site: Site, norm: Any, inputs: Inputs) -> Any:
    """What the final norm reads at the last position [batch, width]."""
    kept: list[Any] = []

    def keep(module: Any, given: Any) -> None:
        kept.append(given[0][:, -1].clone())

    with norm.register_forward_pre_hook(keep):
        site.model.base_model(**inputs, use_cache=False)
    return kept[0]
