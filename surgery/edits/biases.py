"""Constants held by biases: what `x ↦ x + c` before a projection adds to its output, W·c."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from surgery.addresses import Region
from surgery.arch import Architecture, BiasSlot
from surgery.checkpoint import TensorFile, TensorInfo
from surgery.edits.interface import Addition, Array, Layout, Reader, RecipeFiles, Target
from surgery.errors import EditError, quote

Vectors = NDArray[np.float64]


class MeanSource(BaseModel):
    """Mean activations in a safetensors file, one tensor for all layers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    file: str
    key: str = "mean"

    def read(self, files: RecipeFiles, shape: tuple[int, ...]) -> Vectors:
        """The tensor in float64; raises `EditError` where it is not finite or not of `shape`."""
        file = TensorFile.open(files.path(self.file))
        found = file.info(self.key).shape
        if found != shape:
            raise EditError(
                f"{file.path}: {quote(self.key)} has shape {list(found)}; the means of this model "
                f"have {list(shape)}"
            )
        means = file.read(self.key)
        if not np.isfinite(means).all():
            raise EditError(f"{file.path}: {quote(self.key)} holds NaN or infinities")
        return means


@dataclass(frozen=True)
class InputShift:
    """x ↦ x + shifts[layer] before projection `role`, as W·shift in its bias.

    `shifts` are float64 [in] by layer. Raises `EditError` where the family has no such bias.
    """

    role: str
    shifts: Mapping[int, Vectors]

    def slots(self, arch: Architecture) -> dict[int, BiasSlot]:
        """The bias of each layer; raises `EditError` where there can be none."""
        found = {layer: arch.bias_slot(self.role, layer) for layer in self.shifts}
        slots = {layer: slot for layer, slot in found.items() if slot is not None}
        if slots.keys() != found.keys():
            raise EditError(
                f"{arch.family} has no bias at {self.role}, so no weight can hold a mean; leave "
                "mean out, which makes it zero"
            )
        return slots

    def layout(self, arch: Architecture) -> Layout:
        """What it takes for the biases to be there."""
        return flagged(arch, self.slots(arch).values())

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        names = (slot.tensor for slot in self.slots(arch).values())
        return tuple(Target(Region.whole(name, tensors[name].shape), "value") for name in names)

    def prepare(self, arch: Architecture, reader: Reader) -> dict[str, Vectors]:
        """What each bias gains, W·shift float64 [out], from W as earlier edits left it."""
        return {
            slot.tensor: through(arch, self.role, layer, self.shifts[layer], reader)
            for layer, slot in self.slots(arch).items()
        }


def through(arch: Architecture, role: str, layer: int, shift: Vectors, reader: Reader) -> Vectors:
    """W·shift, float64 [out], for projection `role` as earlier edits left it; shift is [in]."""
    # Inputs that stay are left out: 0 times a NaN of theirs would not be nothing.
    moved = np.flatnonzero(shift)
    rows = reader.rows(arch.name(role, layer))
    if arch.input_axis(role) == 1:
        return np.concatenate([slab[:, moved] @ shift[moved] for _, slab in rows])
    total = np.zeros(arch.shape(role)[1])
    for band, slab in rows:
        own = np.flatnonzero(shift[band])
        total += shift[band][own] @ slab[own]
    return total


def flagged(arch: Architecture, slots: Iterable[BiasSlot]) -> Layout:
    """The biases that config fields turn on for `slots`, in every layer; most hold zeros."""
    keys = dict.fromkeys(slot.config_key for slot in slots if slot.config_key is not None)
    added = tuple(
        Addition(name, shape, name.removesuffix("bias") + "weight")
        for key in keys
        for name, shape in arch.flagged_biases(key)
    )
    return Layout(added, dict.fromkeys(keys, True))


def add(slab: Array, added: Vectors) -> Array:
    """`slab` + `added`; where nothing is added the bits stay: -0.0 + 0.0 would be +0.0."""
    return np.where(added == 0, slab, slab + added).astype(slab.dtype)
