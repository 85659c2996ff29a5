"""The Edit contract: what an operation on weights must say about itself.

An op has two faces. `Fields` is the recipe entry as written: a pydantic model, no IO. `Edit` is
the resolved edit of one model: it names its regions from headers alone, prepares a small state
from weights, transforms slabs of weights, and can hook the same intervention into the live,
unedited model, which is the oracle that its weights are tested against.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from surgery.addresses import Region
from surgery.arch import Architecture, Band
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.checkpoint.delta import Factors

Array = NDArray[np.floating[Any]]

Side = Literal["input", "output", "value"]


@dataclass(frozen=True)
class Target:
    """A region an edit writes, and the side of the matrix it acts on.

    `input` multiplies along the input axis, `output` along the output axis, `value` does
    anything else. One edit of each of the first two commute, W ↦ A·W·B being associative; no
    other pair is taken to.
    """

    region: Region
    side: Side

    def conflicts(self, other: Target) -> bool:
        """Whether the order of the two edits matters."""
        commute = {self.side, other.side} == {"input", "output"}
        return not commute and self.region.overlaps(other.region)


@dataclass(frozen=True)
class Addition:
    """A tensor the edited checkpoint has and the base has not.

    It is stored in the shard of `beside` with that tensor's dtype, holding zeros, or the bytes
    of `beside` itself with `copy`.
    """

    name: str
    shape: tuple[int, ...]
    beside: str
    copy: bool = False


@dataclass(frozen=True)
class Layout:
    """Changes beyond the values of tensors: new tensors and config fields."""

    additions: tuple[Addition, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


class Reader(Protocol):
    """Gives `prepare` tensors as the edits before it left them, in compute dtype."""

    def rows(self, tensor: str) -> Iterator[tuple[slice, Array]]:
        """The tensor in bands of whole rows, in order: which rows, and their numbers."""
        ...


class RecipeFiles(Protocol):
    """Gives `Fields.build` the files a recipe names; it records what was read."""

    def path(self, relative: str) -> Path:
        """The file a recipe names."""
        ...

    def folder(self, relative: str) -> Path:
        """The folder a recipe names, to see which files there are to ask `path` for."""
        ...

    def checkpoint(self, relative: str) -> Checkpoint:
        """The checkpoint folder a recipe names."""
        ...


class Edit(ABC):
    """One resolved edit of one model. Subclasses are frozen dataclasses."""

    op: ClassVar[str]

    def layout(self, arch: Architecture) -> Layout:
        """New tensors and config fields this edit needs; most need none."""
        return Layout()

    def grows(self) -> Mapping[str, int]:
        """Which sizes of the model become larger and by how much, for instance `mlp_width`.

        Every tensor along one grows by zeros at its end, and does so first: edits address and
        compute tensors that have them. A tensor with several parts along one cannot grow so.
        """
        return {}

    def drops(self, arch: Architecture) -> tuple[Band, ...]:
        """What of its tensors the edited checkpoint leaves out, along which axis.

        It is left out last: edits address and compute tensors that have it.
        """
        return ()

    def keeps_tie(self) -> bool:
        """Whether what this edit does to a tied embedding is meant for the head as well."""
        return False

    @abstractmethod
    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        """The regions this edit writes, from headers alone.

        `tensors` includes the additions of every edit of the recipe. Raises `EditError` where
        the edit has no meaning for this model.
        """

    def prepare(self, arch: Architecture, reader: Reader) -> Any:
        """The small state `transform` and `hook` need (a direction, norms); by default none."""
        return None

    @abstractmethod
    def transform(self, slab: Array, where: Region, state: Any) -> Array:
        """The new numbers of `where`, from `slab`, its old ones, in compute dtype.

        `where` is a target of this edit, or the part of one in a band of whole rows: an edit
        that needs a sum over rows takes it in `prepare`.
        """

    def factors(self, slab: Array, where: Region, state: Any) -> Factors | None:
        """The change that `transform` makes to the matrix `slab`, as low-rank factors.

        v is the same for every band of a target. None where the edit is no such change.
        """
        return None

    @abstractmethod
    def hook(self, model: Any, arch: Architecture, state: Any) -> AbstractContextManager[None]:
        """The equivalent intervention on activations of the live, unedited transformers model.

        Where heads lie in an activation is taken from the model's own config, not from `arch`,
        so that a wrong axis cannot agree with itself.
        """


class Fields(BaseModel):
    """A recipe entry; subclasses declare the fields of one op."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @abstractmethod
    def build(self, arch: Architecture, files: RecipeFiles) -> Edit:
        """The edit this entry means for a model; reads the files it names.

        Raises `EditError` or `RecipeError` where it means nothing.
        """
