"""What ops that read numbers from a file share: one change for each tensor they name.

A `Replacement` puts given numbers into a box of the tensor. A `Product` adds a matrix of low rank
that is held as two factors, in the orientation y = Wx: `out` [out, rank] lies along what the
module gives, `into` [in, rank] along what it takes, however the file stores the matrix. Numbers
are read band by band, when they are needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Region
from surgery.arch import Architecture, Role
from surgery.checkpoint import TensorFile, TensorInfo
from surgery.edits.interface import Array, Edit, Target
from surgery.edits.live import swapped
from surgery.edits.projection import like
from surgery.errors import EditError, describe, quote

Vectors = NDArray[np.float64]


class Change(ABC):
    """A change of one tensor."""

    @abstractmethod
    def region(self, tensor: str, shape: tuple[int, ...]) -> Region:
        """The part of `tensor` that changes; raises `EditError` where the shapes do not fit."""

    @abstractmethod
    def transform(self, slab: Array, where: Region) -> Array:
        """The new numbers of `where`, as `Edit.transform` gives them."""

    @abstractmethod
    def hook(self, model: Any, arch: Architecture, tensor: str) -> AbstractContextManager[Any]:
        """The same change in the live, unedited model."""


@dataclass(frozen=True)
class Replacement(Change):
    """Tensor `key` of `file` in place of the box that begins at `start`, or of the whole."""

    file: TensorFile
    key: str
    start: tuple[int, ...] | None = None

    def region(self, tensor: str, shape: tuple[int, ...]) -> Region:
        given = self.file.info(self.key).shape
        if self.start is None:
            if given != shape:
                raise EditError(
                    f"{self.file.path}: {quote(self.key)} has shape {list(given)}, "
                    f"{quote(tensor)} of this model {list(shape)}"
                )
            return Region.whole(tensor, shape)
        axes = zip(self.start, given, strict=False)
        stop = tuple(first + size for first, size in axes)
        fits = len(self.start) == len(given) == len(shape)
        if not fits or any(end > size for end, size in zip(stop, shape, strict=True)):
            raise EditError(
                f"{self.file.path}: {quote(self.key)} has shape {list(given)} and does not fit "
                f"at {list(self.start)} into {quote(tensor)} of shape {list(shape)}"
            )
        return Region(tensor, self.start, stop)

    def transform(self, slab: Array, where: Region) -> Array:
        origin = self.start or (0,) * len(where.start)
        if not where.shape:
            return self.file.rows(self.key, 0, 0).astype(slab.dtype)
        first, stop = where.start[0] - origin[0], where.stop[0] - origin[0]
        return self.file.rows(self.key, first, stop).astype(slab.dtype)

    def hook(self, model: Any, arch: Architecture, tensor: str) -> AbstractContextManager[None]:
        from safetensors.torch import load_file

        def replace(old: Any) -> Any:
            given = load_file(self.file.path)[self.key]
            start = self.start or (0,) * given.ndim
            axes = zip(start, given.shape, strict=True)
            new = old.detach().clone()
            new[tuple(slice(first, first + size) for first, size in axes)] = given.to(new)
            return new

        return swapped(model, arch, {tensor: replace})


@dataclass(frozen=True)
class Factor:
    """A matrix [n, rank] of a file, float64 when read; `transposed`: stored as [rank, n].

    A vector is a matrix of rank one.
    """

    file: TensorFile
    key: str
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, rank), or what the file has where that is no matrix."""
        shape = self.file.info(self.key).shape
        shape = (*shape, 1) if len(shape) == 1 else shape
        return shape[::-1] if self.transposed else shape

    def rows(self, start: int, stop: int) -> Vectors:
        """Rows `start` to `stop`, [stop − start, rank]."""
        if self.transposed:
            return self.file.read(self.key).T[start:stop]
        return self.file.rows(self.key, start, stop).astype(np.float64).reshape(stop - start, -1)

    def read(self) -> Vectors:
        return self.rows(0, self.shape[0])


@dataclass(frozen=True)
class Product(Change):
    """ΔW = scale · out · intoᵀ in the orientation y = Wx, whose input lies on `input_axis`."""

    out: Factor
    into: Factor
    scale: float
    input_axis: int

    def region(self, tensor: str, shape: tuple[int, ...]) -> Region:
        outputs, inputs = shape if self.input_axis == 1 else shape[::-1]
        for factor, size, side in ((self.out, outputs, "out"), (self.into, inputs, "in")):
            if len(factor.shape) != 2 or factor.shape[0] != size:
                found = list(factor.file.info(factor.key).shape)
                raise EditError(
                    f"{factor.file.path}: {quote(factor.key)} has shape {found}; "
                    f"{quote(tensor)} has {size} {side}puts"
                )
        if self.out.shape[1] != self.into.shape[1]:
            raise EditError(
                f"{self.out.file.path}: {quote(self.out.key)} has rank {self.out.shape[1]}, "
                f"{quote(self.into.key)} rank {self.into.shape[1]}"
            )
        return Region.whole(tensor, shape)

    def transform(self, slab: Array, where: Region) -> Array:
        if self.scale == 0:
            return slab
        rows, columns = (self.out, self.into) if self.input_axis == 1 else (self.into, self.out)
        left = rows.rows(where.start[0], where.stop[0])
        added = (self.scale * left) @ columns.rows(where.start[1], where.stop[1]).T
        # -0.0 + 0.0 is +0.0, and adding nothing must change nothing.
        return np.where(added == 0, slab, slab + added).astype(slab.dtype)

    def hook(self, model: Any, arch: Architecture, tensor: str) -> AbstractContextManager[Any]:
        """y ↦ y + scale · out(intoᵀx) where the live module is that matrix and no more; else, of
        experts and embeddings with something of their own, the parameter itself."""
        import torch
        from transformers.pytorch_utils import Conv1D

        module, _ = arch.holder(model, tensor)
        if not (
            isinstance(module, torch.nn.Linear) or type(module) in (Conv1D, torch.nn.Embedding)
        ):
            return swapped(model, arch, {tensor: self._add})

        def add(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            out, into = self._factors(output)
            x = inputs[0]
            read = x.to(output) @ into if x.is_floating_point() else into[x]
            return output + self.scale * read @ out.T

        handle: AbstractContextManager[Any] = module.register_forward_hook(add)
        return handle

    def _factors(self, tensor: Any) -> tuple[Any, Any]:
        return like(self.out.read(), tensor), like(self.into.read(), tensor)

    def _add(self, old: Any) -> Any:
        out, into = self._factors(old)
        change = self.scale * out @ into.T
        return old + (change if self.input_axis == 1 else change.T)


@dataclass(frozen=True)
class TensorChanges(Edit):
    """One change for each of some tensors."""

    changes: Mapping[str, Change]

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        return tuple(
            Target(change.region(tensor, _shape(arch, tensors, tensor)), "value")
            for tensor, change in self.changes.items()
        )

    def transform(self, slab: Array, where: Region, state: None) -> Array:
        return self.changes[where.tensor].transform(slab, where)

    @contextmanager
    def hook(self, model: Any, arch: Architecture, state: None) -> Iterator[None]:
        with ExitStack() as stack:
            for tensor, change in self.changes.items():
                stack.enter_context(change.hook(model, arch, tensor))
            yield


def roles_of(arch: Architecture, names: Iterable[str], source: object) -> dict[str, Role]:
    """The role of each named tensor, stored or the head that untying gives a tied model.

    Raises `EditError` naming those that are no tensor of this model.
    """
    head = arch.facts.tie.head
    roles = {arch.name(head): Role(head, None, "weight"), **arch.roles}
    unknown = [name for name in names if name not in roles]
    if unknown:
        raise EditError(
            f"{source}: this {arch.family} model has no {describe(unknown)}; "
            f"its tensors are named like {describe(arch.roles, 1)}"
        )
    return {name: roles[name] for name in names}


def input_axis(arch: Architecture, role: Role, source: object) -> int:
    """The axis of a stored matrix its input runs along; an embedding takes its rows.

    Raises `EditError` where the role is no matrix.
    """
    kind = arch.facts.modules[role.role].type
    if role.kind != "weight" or kind not in ("linear", "conv1d", "embedding"):
        raise EditError(f"{source}: {role} is no matrix, so no low-rank product can be added to it")
    return 0 if kind == "embedding" else arch.input_axis(role.role)


def _shape(arch: Architecture, tensors: Mapping[str, TensorInfo], tensor: str) -> tuple[int, ...]:
    # The head of a tied model is asked for before untying it is planned.
    return tensors[tensor].shape if tensor in tensors else arch.shape(arch.facts.tie.head)
