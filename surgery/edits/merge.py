"""`merge`: mix the weights of other checkpoints of the same family into this one.

With θ the base, θ_i the others, w_i their weights and δ_i = θ_i − θ:

- `linear`: the mean (1 − Σw)·θ + Σ w_i·θ_i; weights from 0 to 1 that sum to at most 1.
- `task_arithmetic` (arXiv 2212.04089): θ + Σ w_i·δ_i, any weights: past 1 it extrapolates.
- `slerp`: one other; along the arc between the two tensors as vectors, t = w: with φ the angle,
  sin((1 − t)φ)/sin φ·θ + sin(tφ)/sin φ·θ_1. Colinear tensors (|cos φ| > 0.9995) take the mean.
- `ties` (arXiv 2306.01708): of each δ_i only its `density` of largest magnitude is kept, equal
  ones included; per element the sign of Σ w_i·δ_i is elected (+ on a draw), and Σ w_i·δ_i over
  those of that sign is added, divided by the sum of their weights unless `normalize: false`.

These are mergekit's definitions. Tensors are matched by role; sizes must agree but for the
vocabulary, of which `vocabulary: shared` merges the rows that both have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from surgery.addresses import Region
from surgery.arch import Architecture, Role, identify
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.checkpoint.dtypes import EDITABLE
from surgery.edits.interface import Array, Edit, Fields, Reader, RecipeFiles, Target
from surgery.edits.live import swapped
from surgery.edits.mixing import Vectors, arc, elected, least_kept, weighted
from surgery.errors import EditError, RecipeError, quote

Method = Literal["linear", "task_arithmetic", "slerp", "ties"]


class PartnerFields(BaseModel):
    """One checkpoint to mix in: its folder and its weight."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: str
    weight: float


class MergeFields(Fields):
    """`{op: merge, with: [{model: other, weight: 0.4}], method: linear}`.

    `include` and `exclude` are shell patterns on tensor names; `density` and `normalize` go with
    `ties` only.
    """

    op: Literal["merge"]
    with_: Annotated[list[PartnerFields], Field(min_length=1)] = Field(alias="with")
    method: Method = "linear"
    include: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["*"])
    exclude: list[str] = Field(default_factory=list)
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    normalize: bool | None = None
    vocabulary: Literal["refuse", "shared"] = "refuse"

    def build(self, arch: Architecture, files: RecipeFiles) -> MergeEdit:
        self._refuse_weights()
        if self.method != "ties" and (self.density, self.normalize) != (None, None):
            raise RecipeError(f"density and normalize have no meaning with method {self.method}")
        partners = tuple(
            Partner(checkpoint, identify(checkpoint), given.weight)
            for given in self.with_
            for checkpoint in [files.checkpoint(given.model)]
        )
        return MergeEdit(
            partners,
            self.method,
            tuple(self.include),
            tuple(self.exclude),
            1.0 if self.density is None else self.density,
            self.normalize is not False,
            self.vocabulary == "shared",
        )

    def _refuse_weights(self) -> None:
        weights = [partner.weight for partner in self.with_]
        if self.method == "slerp" and len(weights) != 1:
            raise RecipeError(f"slerp is between two models; with names {len(weights)} others")
        bounded = self.method in ("linear", "slerp")
        if bounded and (min(weights) < 0 or sum(weights) > 1 + 1e-9):
            raise RecipeError(
                f"{self.method} needs weights from 0 to 1 that sum to at most 1, found {weights}; "
                "task_arithmetic takes any"
            )


@dataclass(frozen=True)
class Partner:
    """A checkpoint to mix in with `weight`."""

    checkpoint: Checkpoint
    arch: Architecture
    weight: float

    def info(self, role: Role) -> TensorInfo | None:
        """The tensor that plays `role` here: of a tied head, what it is tied to."""
        tie, tensors = self.arch.facts.tie, self.checkpoint.tensors
        name = self.arch.name(role.role, role.layer, role.kind, role.expert)
        if name not in tensors and self.arch.tied and role.role == tie.head:
            other = tie.embed if role.kind == "weight" else tie.bias
            name = self.arch.name(other) if other is not None else name
        return tensors.get(name)

    def rows(self, role: Role, where: Region) -> Vectors:
        """The rows of `where`, a band of the tensor of that role, in float64."""
        info = self.info(role)
        if info is None:
            raise EditError(f"{self.checkpoint.root}: has no tensor for {role}")
        return self.checkpoint.read_rows(info.name, where).astype(np.float64)


@dataclass(frozen=True)
class MergeEdit(Edit):
    """Every chosen tensor becomes a mixture of the models' own."""

    op: ClassVar[str] = "merge"
    partners: tuple[Partner, ...]
    method: Method
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    density: float
    normalize: bool
    shared_vocabulary: bool

    @property
    def weighing(self) -> tuple[Partner, ...]:
        """The partners whose weight is not 0: the others' numbers, NaN or not, do nothing."""
        return tuple(partner for partner in self.partners if partner.weight != 0)

    def keeps_tie(self) -> bool:
        return all(partner.arch.tied for partner in self.partners)

    def targets(self, arch: Architecture, tensors: Mapping[str, TensorInfo]) -> tuple[Target, ...]:
        names = [name for name in arch.roles if self._chosen(name)]
        for pattern in self.include:
            if not any(fnmatchcase(name, pattern) for name in arch.roles):
                raise RecipeError(f"include {quote(pattern)} matches no tensor of this model")
        if not names:
            raise RecipeError("include and exclude leave no tensor to merge")
        for partner in self.partners:
            self._refuse_mismatch(arch, tensors, names, partner)
        return tuple(Target(self._region(arch, tensors[name]), "value") for name in names)

    def _chosen(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.include) and not any(
            fnmatchcase(name, pattern) for pattern in self.exclude
        )

    def _refuse_mismatch(
        self,
        arch: Architecture,
        tensors: Mapping[str, TensorInfo],
        names: list[str],
        partner: Partner,
    ) -> None:
        root = partner.checkpoint.root
        if partner.arch.family != arch.family:
            raise EditError(f"{root}: is of family {partner.arch.family}, this is {arch.family}")
        theirs = {arch.name(r.role, r.layer, r.kind, r.expert) for r in partner.arch.roles.values()}
        problems = [f"{quote(n)} is only there" for n in theirs - {*arch.roles} if self._chosen(n)]
        for name in names:
            problems += self._mismatch(arch, tensors[name], partner)
        if problems:
            raise EditError(f"{root}: does not match: {_listed(sorted(problems))}")

    def _mismatch(self, arch: Architecture, info: TensorInfo, partner: Partner) -> Iterator[str]:
        """What keeps one tensor from being mixed with the partner's."""
        other = partner.info(arch.roles[info.name])
        if other is None:
            yield f"{quote(info.name)} is missing there"
        elif other.dtype not in EDITABLE:
            yield f"{quote(info.name)} is stored as {other.dtype} there"
        elif other.shape != info.shape:
            shapes = f"{quote(info.name)} has shape {list(other.shape)} there, here {[*info.shape]}"
            vocabulary = _has_vocabulary_rows(arch, info) and other.shape[1:] == info.shape[1:]
            if not vocabulary:
                yield shapes
            elif not self.shared_vocabulary:
                yield f"{shapes} (vocabulary: shared merges the rows both have)"

    def _region(self, arch: Architecture, info: TensorInfo) -> Region:
        """The whole tensor, or the rows of the vocabulary that all models have."""
        rows = min(info.shape[0], self._rows(arch.roles[info.name]))
        return Region.band(info.name, info.shape, 0, 0, rows)

    def _rows(self, role: Role) -> int:
        """How many rows every partner has."""
        infos = [partner.info(role) for partner in self.partners]
        return min(info.shape[0] for info in infos if info is not None)

    def prepare(self, arch: Architecture, reader: Reader) -> Mapping[str, Mixture]:
        roles = {name: role for name, role in arch.roles.items() if self._chosen(name)}
        return {name: self._mixture(name, role, reader) for name, role in roles.items()}

    def _mixture(self, name: str, role: Role, reader: Reader) -> Mixture:
        if not self.weighing:
            return Mixture(role)
        if self.method == "slerp":
            return Mixture(role, arc=self._arc(name, role, reader))
        if self.method == "ties" and self.density < 1:
            floors = [self._floor(name, role, partner, reader) for partner in self.weighing]
            return Mixture(role, floors=tuple(floors))
        return Mixture(role)

    def _arc(self, name: str, role: Role, reader: Reader) -> tuple[float, float]:
        [partner] = self.weighing
        sums = np.zeros(3)
        for base, other in self._pairs(name, role, partner, reader):
            a, b = base.ravel(), other.ravel()
            sums += a @ b, a @ a, b @ b
        return arc(sums, partner.weight)

    def _floor(self, name: str, role: Role, partner: Partner, reader: Reader) -> float:
        def magnitudes() -> Iterator[Array]:
            for base, other in self._pairs(name, role, partner, reader):
                yield magnitude(other - base)

        return least_kept(magnitudes, self.density)

    def _pairs(
        self, name: str, role: Role, partner: Partner, reader: Reader
    ) -> Iterator[tuple[Vectors, Vectors]]:
        """The base's and the partner's numbers in float64, band by band, of the rows all have."""
        rows = self._rows(role)
        for band, slab in reader.rows(name):
            base = slab[: max(0, rows - band.start)].astype(np.float64)
            if len(base):
                where = Region.band(name, slab.shape, 0, band.start, band.start + len(base))
                yield base, partner.rows(role, where)

    def transform(self, slab: Array, where: Region, state: Mapping[str, Mixture]) -> Array:
        mixture = state[where.tensor]
        if not self.weighing:
            return slab
        weights = [partner.weight for partner in self.weighing]
        others = [partner.rows(mixture.role, where) for partner in self.weighing]
        if self.method == "slerp":
            mine, theirs = mixture.arc
            return (mine * slab.astype(np.float64) + theirs * others[0]).astype(slab.dtype)
        changes = [other - slab for other in others]
        if self.method == "ties":
            change = elected(mixture.trimmed(changes), weights, self.normalize)
        else:
            change = weighted(changes, weights)
        # -0.0 + 0.0 is +0.0, and adding nothing must change nothing.
        return np.where(change == 0, slab, slab + change).astype(slab.dtype)

    def hook(
        self, model: Any, arch: Architecture, state: Mapping[str, Mixture]
    ) -> AbstractContextManager[None]:
        """The live model with mixed parameters: a merge is nothing else on activations."""

        def mix(name: str, old: Any) -> Any:
            mixed = old.detach().clone()
            rows = min(len(mixed), self._rows(state[name].role))
            own = mixed[:rows].numpy()
            own[...] = self.transform(own.copy(), Region.whole(name, own.shape), state)
            return mixed

        return swapped(model, arch, {name: partial(mix, name) for name in state})


@dataclass(frozen=True)
class Mixture:
    """What mixing one tensor takes: its role, and of it as a whole what base and other are
    multiplied by (`arc`) or under which magnitude a partner's change is dropped (`floors`)."""

    role: Role
    arc: tuple[float, float] = (1.0, 0.0)
    floors: tuple[float, ...] = ()

    def trimmed(self, changes: list[Vectors]) -> list[Vectors]:
        """`changes` without what lies under the floors."""
        if not self.floors:
            return changes
        pairs = zip(changes, self.floors, strict=True)
        return [np.where(magnitude(change) >= floor, change, 0) for change, floor in pairs]


def magnitude(change: Vectors) -> Array:
    """|δ| in float32, by which changes are ranked; rounding keeps the order."""
    return np.abs(change).astype(np.float32)


def _has_vocabulary_rows(arch: Architecture, info: TensorInfo) -> bool:
    role = arch.roles[info.name]
    module = arch.facts.modules[role.role]
    return module.shape(role.kind)[0] == "vocab"


def _listed(problems: list[str], limit: int = 5) -> str:
    shown = "; ".join(problems[:limit])
    return shown if len(problems) <= limit else f"{shown}; and {len(problems) - limit} more"
