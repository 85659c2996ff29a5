"""`sae` with `patch: append_neuron`: a feature becomes a neuron of the MLP whose input it reads.

With s the autoencoder's input scale, a feature is f = relu(s·x·W_enc[:, i] + b), where b is
b_enc[i], less b_dec·W_enc[:, i] where the encoder sees s·x − b_dec. A new neuron of a plain MLP has
the row s·W_enc[:, i] and the bias b before the activation and strength·W_dec[i]/s after it, so that
what the MLP writes gains strength·f·W_dec[i]/s. In a gated MLP that row is the gate's; the neuron's
row of `up` is zero and its bias there 1, so that the gate alone counts.

One config field gives the width of every MLP, so those of the other layers grow too, by neurons of
zeros, which add nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

import numpy as np

from surgery.addresses import Neuron, Region
from surgery.arch import Architecture, Band, BiasSlot
from surgery.checkpoint import TensorInfo
from surgery.edits.autoencoders import Autoencoder
from surgery.edits.biases import flagged
from surgery.edits.interface import Array, Edit, Layout, Reader, Target
from surgery.edits.projection import Vectors, like
from surgery.errors import EditError

ACTIVATION = "relu"
WIDTH = "mlp_width"

Numbers = dict[str, tuple[Region, Vectors]]
"""By tensor, the part of it that new neurons have and what that holds."""


@dataclass(frozen=True)
class Features:
    """k features as their files have them: `encoder` [k, in] and `decoder` [k, width] rows, `b_enc`
    [k], and `b_dec` [in], which is zero where the encoder does not subtract it."""

    encoder: Vectors
    decoder: Vectors
    b_enc: Vectors
    b_dec: Vectors
    scale: float

    @property
    def rows(self) -> Vectors:
        """What the features read, in the model's units [k, in]."""
        return self.scale * self.encoder

    @property
    def bias(self) -> Vectors:
        """What is added to that before the activation [k]."""
        return self.b_enc - self.encoder @ self.b_dec

    def written(self, x: Any) -> Any:
        """What the features write in the model's units, of a live input x [tokens, in]."""
        import torch

        seen = self.scale * x - like(self.b_dec, x)
        activations = torch.relu(seen @ like(self.encoder, x).T + like(self.b_enc, x))
        return activations @ like(self.decoder, x) / self.scale


@dataclass(frozen=True)
class AppendNeuron(Edit):
    """y ↦ y + strength·f(x)·D for the input x of the MLP of `layer` and its output y.

    D [k, width] are the decoder rows of `features` and f [tokens, k] their activations; a strength
    of 0 appends nothing.
    """

    op: ClassVar[str] = "sae"
    features: Features
    strength: float
    layer: int

    def grows(self) -> Mapping[str, int]:
        return {WIDTH: self._count} if self._count else {}

    def layout(self, arch: Architecture) -> Layout:
        return flagged(arch, self._slots(arch))

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        return tuple(Target(region, "value") for region, _ in self._numbers(arch).values())

    def prepare(self, arch: Architecture, reader: Reader) -> Numbers:
        return self._numbers(arch)

    def transform(self, slab: Array, where: Region, state: Numbers) -> Array:
        region, numbers = state[where.tensor]
        return numbers[where.within(region)].astype(slab.dtype)

    @contextmanager
    def hook(self, model: Any, arch: Architecture, state: Any) -> Iterator[None]:
        read: list[Any] = []

        def before(module: Any, inputs: tuple[Any, ...]) -> None:
            read.append(inputs[0])

        def after(module: Any, inputs: Any, output: Any) -> Any:
            return output + self.strength * self.features.written(read.pop())

        enters, leaves = (
            arch.module(model, role, self.layer) for role in (arch.mlp_inputs[0], "down_proj")
        )
        with ExitStack() as stack:
            stack.enter_context(enters.register_forward_pre_hook(before))
            stack.enter_context(leaves.register_forward_hook(after))
            yield

    @property
    def _count(self) -> int:
        return len(self.features.encoder) if self.strength else 0

    def _slots(self, arch: Architecture) -> list[BiasSlot]:
        """The biases that the neurons need; raises `EditError` where there can be none."""
        roles = arch.mlp_inputs
        gated = roles != ("up_proj",)
        if not self._count or not (gated or self.features.bias.any()):
            return []
        slots = [arch.bias_slot(role, self.layer) for role in roles]
        found = [slot for slot in slots if slot is not None]
        if len(found) < len(slots):
            needs = "so that its gate alone counts" if gated else "as the feature has one"
            _refuse(arch, f"has no bias in its MLPs, which a neuron needs {needs}")
        return found

    def _numbers(self, arch: Architecture) -> Numbers:
        if not self._count:
            return {}
        first = Neuron(self.layer, arch.sizes[WIDTH] - self._count)
        parts = arch.gate_up_regions(first)
        reads = parts.get("gate", parts["up"])
        down = Band(arch.neuron_region(first), arch.input_axis("down_proj"))
        placed = [
            *zip(reads, (self.features.rows, self.features.bias), strict=False),
            *((band, np.ones(self._count)) for band in parts["up"][1:] if "gate" in parts),
            (down, self.strength * self.features.decoder / self.features.scale),
        ]
        return {band.region.tensor: self._place(band, values) for band, values in placed}

    def _place(self, band: Band, values: Vectors) -> tuple[Region, Vectors]:
        """Where `values`, of which the first axis is the neurons, lie from the first one on."""
        region, axis = band.region, band.axis
        stop = list(region.stop)
        stop[axis] += self._count - 1
        return replace(region, stop=tuple(stop)), np.moveaxis(values, 0, axis)


def append(
    sae: Autoencoder,
    features: Sequence[int],
    rows: Vectors,
    strength: float,
    layer: int,
    arch: Architecture,
) -> AppendNeuron:
    """The edit that gives the MLP of `layer` a neuron for each of `features`, which write `rows`.

    Raises `EditError` where no neuron of this model is such a feature, or none can be added.
    """
    if layer in arch.sparse:
        _refuse(arch, f"has experts, of which a token passes only some, in layer {layer}")
    if not arch.config_keys(WIDTH):
        _refuse(arch, "has no config field for the width of its MLPs")
    if arch.activation != ACTIVATION:
        _refuse(arch, f"gates neurons otherwise than a feature's relu, by {arch.activation}")
    if sae.activation != ACTIVATION:
        _refuse(arch, f"gates neurons by relu and not, as these features are, by {sae.activation}")
    encoder = sae.encoder_columns(features)
    edit = AppendNeuron(
        Features(
            encoder,
            rows,
            sae.vector("b_enc")[list(features)],
            sae.vector("b_dec") if sae.centered else np.zeros(encoder.shape[1]),
            sae.scale("append_neuron"),
        ),
        strength,
        layer,
    )
    edit.layout(arch)
    return edit


def _refuse(arch: Architecture, reason: str) -> NoReturn:
    """Raises `EditError`: why no neuron can stand for a feature."""
    raise EditError(
        f"append_neuron has no place in this {arch.family} model, which {reason}; with an "
        "autoencoder of the stream, rank1 adds a feature without its gate, steer_bias a constant "
        "amount of it"
    )
