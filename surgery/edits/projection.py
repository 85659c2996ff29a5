"""What ops that take directions out share: bases, projections, and writers of the stream.

A projection of the outputs removes a direction from everything that writes to the residual
stream: Linear W − s·QQᵀW; Conv1D, embeddings and biases W − s·WQQᵀ, with Q an orthonormal basis
[width, rank] of what is removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Region
from surgery.arch import Architecture, Writer
from surgery.checkpoint import TensorInfo
from surgery.checkpoint.delta import Factors
from surgery.edits.interface import Array, Edit, Reader, Target
from surgery.errors import EditError, quote

Vectors = NDArray[np.float64]


def basis(rows: Vectors) -> Vectors:
    """An orthonormal basis [width, rank] of the span of `rows` [k, width], in float64.

    One basis, not one projection after another: the latter leaves part of the earlier rows.
    """
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    _, singular, right = np.linalg.svd(unit, full_matrices=False)
    rank = int((singular > 1e-10 * singular[0]).sum())
    return np.array(right[:rank].T, np.float64, order="C")


def project(
    slab: Array, q: Vectors, strength: float, where: Region, along: Vectors | None
) -> Array:
    """`slab` less `strength` times its part along `q` [width, rank], in slab's dtype.

    The width runs along the last axis of the tensor, or along its rows if `along` = qᵀW
    [rank, …] of the whole tensor is given, of which `slab` is the part `where`.
    """
    if strength == 0:
        return slab
    left, right = projection(slab, q, strength, where, along)
    changed = left @ right
    np.add(slab, changed, out=changed)
    return changed.astype(slab.dtype)


def projection(
    slab: Array, q: Vectors, strength: float, where: Region, along: Vectors | None
) -> Factors:
    """What `project` adds to `slab`, as factors.

    In float64, so that the sums come out the same whatever the bands and the BLAS: who verifies
    on another machine must find the same numbers.
    """
    if along is None:
        return slab.astype(np.float64) @ q, -strength * q.T
    return -strength * q[where.slices[0]], along[(slice(None), *where.slices[1:])]


def along_rows(tensor: str, q: Vectors, axis: int, reader: Reader) -> Vectors | None:
    """qᵀW [rank, …] where the width runs along the rows (`axis` 0), else None.

    One read of the tensor: a band of rows alone does not know the part along q.
    """
    if axis != 0:
        return None
    total: Any = 0.0
    for band, slab in reader.rows(tensor):
        total = total + q[band].T @ slab
    return np.asarray(total, np.float64)


def refuse_inexact(op: str, arch: Architecture, writers: Iterable[Writer]) -> None:
    """Raises `EditError` where something rescales what a matrix writes to the stream."""
    for writer in writers:
        if writer.norm is not None:
            raise EditError(
                f"{op} is not exact on {arch.family}, which normalises what is written by "
                f"{quote(writer.tensor)}; say approximate: true to do it all the same"
            )


@dataclass(frozen=True)
class OutputProjection(Edit):
    """What each writer in `layers` (with `embeddings`, those too) adds loses its part in Q."""

    q: Vectors
    strength: float
    layers: tuple[int, ...]
    embeddings: bool

    def writers(self, arch: Architecture) -> tuple[Writer, ...]:
        """The tensors this edit writes."""
        return tuple(arch.writers(self.layers, self.embeddings))

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        return tuple(
            Target(Region.whole(w.tensor, tensors[w.tensor].shape), "output")
            for w in self.writers(arch)
        )

    def prepare(self, arch: Architecture, reader: Reader) -> Mapping[str, Any]:
        return {w.tensor: along_rows(w.tensor, self.q, w.axis, reader) for w in self.writers(arch)}

    def transform(self, slab: Array, where: Region, state: Any) -> Array:
        return project(slab, self.q, self.strength, where, state[where.tensor])

    def factors(self, slab: Array, where: Region, state: Any) -> Factors | None:
        if slab.ndim != 2:
            return None
        return projection(slab, self.q, self.strength, where, state[where.tensor])

    @contextmanager
    def hook(self, model: Any, arch: Architecture, state: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for _, module in self.modules(model, arch):
                stack.enter_context(module.register_forward_hook(self._project_output))
            yield

    def modules(self, model: Any, arch: Architecture) -> Iterator[tuple[str, Any]]:
        """Every live module that writes what is edited, once, with its role."""
        roles = [arch.roles[writer.tensor] for writer in self.writers(arch)]
        for role, layer in {(role.role, role.layer) for role in roles}:
            yield role, arch.module(model, role, layer)

    def _project_output(self, module: Any, inputs: Any, output: Any) -> Any:
        return project_torch(output, self.q, self.strength)


def project_torch(x: Any, q: Vectors, strength: float) -> Any:
    """x [..., width] less `strength` times its part along `q`, in torch."""
    basis_ = like(q, x)
    return x - strength * ((x @ basis_) @ basis_.T)


def like(values: Vectors, tensor: Any) -> Any:
    """`values` as a torch tensor of the dtype and device of `tensor`."""
    import torch

    return torch.from_numpy(values).to(tensor)
