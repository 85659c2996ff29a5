"""Spectra of what heads write, and how later heads read it (arXiv 2406.09519), from weights alone.

In row vectors, W_OV = W_V·W_O = Σ σ_i u_i v_iᵀ of an earlier head meets a later one in three ways:
its queries, ‖W_OV W_QK‖_F, its keys, ‖W_QK W_OVᵀ‖_F, and its values, ‖W_OV W_OV'‖_F, each over the
product of both norms (Elhage et al. 2021). Of component i alone that is ‖v_iᵀX‖/‖X‖_F, with X the
later head's W_QK, W_QKᵀ or W_OV', and of the whole head the mean of its squares by weight σ_i².

No [width, width] matrix is formed: X = ABᵀ with A and B [width, head_dim], and with the triangular
factors of their QR decompositions ‖ABᵀ‖_F = ‖R_A R_Bᵀ‖_F and ‖v_iᵀABᵀ‖ = ‖(v_iᵀA)R_Bᵀ‖.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Head
from surgery.arch import Architecture
from surgery.checkpoint import Checkpoint
from surgery.edits.head_spectrum import reads, writes
from surgery.edits.spectrum import distinct, of_product, refuse_nonfinite
from surgery.find.scores.weights import StoredReader

Floats = NDArray[np.float64]

WAYS = ("q", "k", "v")
_FACTORS = {"q": ("q", "k"), "k": ("k", "q"), "v": ("v", "o")}
"""A and B of what a later head's queries, keys and values read a stream vector through."""


@dataclass(frozen=True)
class Spectra:
    """The OV circuits of one layer's heads, components by falling singular value.

    sigma [heads, r]; right: v_i in columns [heads, width, r]; own [heads, r]: whether a component
    has a direction of its own.
    """

    sigma: Floats
    right: Floats
    own: NDArray[np.bool_]


def spectra(arch: Architecture, checkpoint: Checkpoint, layer: int, fold_norm: bool) -> Spectra:
    """The spectra of a layer's heads; raises `EditError` where a weight is not finite."""
    reader = StoredReader(checkpoint, hold=True)
    found = []
    for head in _heads(arch, layer):
        values = reads(arch, reader, "v", head, fold_norm)
        outputs = writes(arch, reader, head)
        refuse_nonfinite(np.concatenate([values, outputs]), head)
        _, squares, right = of_product(values, outputs)
        found.append((np.sqrt(squares), right, distinct(squares)))
    sigma, vectors, own = zip(*found, strict=True)
    return Spectra(np.stack(sigma), np.stack(vectors), np.stack(own))


def _heads(arch: Architecture, layer: int) -> list[Head]:
    return [Head(layer, head) for head in range(arch.sizes["heads"])]


def written(
    arch: Architecture, checkpoint: Checkpoint, layer: int, right: Floats
) -> NDArray[np.float64]:
    """What each head of a layer writes along its components: W_O V [heads, head_dim, r], which a
    head's output z multiplies."""
    reader = StoredReader(checkpoint, hold=True)
    outputs = [writes(arch, reader, head) for head in _heads(arch, layer)]
    return np.stack([o.T @ v for o, v in zip(outputs, right, strict=True)])


@dataclass(frozen=True)
class Readings:
    """How each later head reads each component of a layer's heads.

    parts: [ways, heads, r, later heads], of components; wholes: [ways, heads, later heads].
    """

    parts: Floats
    wholes: Floats


def readings(
    arch: Architecture,
    checkpoint: Checkpoint,
    sender: Spectra,
    layer: int,
    ways: Sequence[str],
    fold_norm: bool,
) -> Readings:
    """How the heads of `layer` read what `sender`, an earlier layer, writes, in each of `ways`."""
    reader = StoredReader(checkpoint, hold=True)
    heads, width, rank = sender.right.shape
    rows = sender.right.transpose(0, 2, 1).reshape(heads * rank, width)
    parts = np.empty((len(ways), heads, rank, arch.sizes["heads"]))
    for number, head in enumerate(_heads(arch, layer)):
        matrices = _matrices(arch, reader, head, ways, fold_norm)
        for way, name in enumerate(ways):
            a, b = (matrices[part] for part in _FACTORS[name])
            parts[way, :, :, number] = _read(rows, a, b).reshape(heads, rank)
    return Readings(parts, _wholes(sender.sigma, parts))


def _matrices(
    arch: Architecture, reader: StoredReader, head: Head, ways: Sequence[str], fold_norm: bool
) -> dict[str, Floats]:
    """W_Q, W_K, W_V and W_Oᵀ of a head [width, head_dim], as far as `ways` need them."""
    needed = {part for way in ways for part in _FACTORS[way]}
    found = {
        part: writes(arch, reader, head)
        if part == "o"
        else reads(arch, reader, part, head, fold_norm)
        for part in sorted(needed)
    }
    for matrix in found.values():
        refuse_nonfinite(matrix, head)
    return found


def _read(rows: Floats, a: Floats, b: Floats) -> Floats:
    """‖vᵀABᵀ‖ / ‖ABᵀ‖_F for every row v of `rows` [n, width]; 0 where ABᵀ is."""
    left, right = (np.asarray(np.linalg.qr(m, mode="r"), np.float64) for m in (a, b))
    norm = float(np.linalg.norm(left @ right.T))
    found = np.asarray(np.linalg.norm((rows @ a) @ right.T, axis=1), np.float64)
    return found / norm if norm else np.zeros(len(rows))


def _wholes(sigma: Floats, parts: Floats) -> Floats:
    """‖W_OV X‖_F / (‖W_OV‖_F ‖X‖_F) from its components'; 0 where W_OV is."""
    squares = sigma**2
    total = squares.sum(axis=1, keepdims=True)
    weights = np.divide(squares, total, out=np.zeros_like(squares), where=total > 0)
    return np.asarray(np.sqrt(np.einsum("hr,whrl->whl", weights, parts**2)), np.float64)
