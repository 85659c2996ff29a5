"""A recipe and a checkpoint's headers to a frozen `Plan`; no weight byte is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Region
from surgery.arch import Architecture, Band, extend, identify, widened
from surgery.checkpoint import Checkpoint, Header, TensorInfo
from surgery.checkpoint.dtypes import EDITABLE, compute_dtype, numpy_dtype
from surgery.checkpoint.layout import NewTensor, new_headers, tensors_of
from surgery.checkpoint.resize import Resize, Side
from surgery.edits import Addition, Edit, Target
from surgery.errors import EditError, InputError, RecipeError
from surgery.recipe import Recipe, RecipeFolder, load_recipe


@dataclass(frozen=True)
class Step:
    """Edit number `edit` of the recipe writes one region; `role` is that tensor's."""

    edit: int
    target: Target
    role: str

    @property
    def tensor(self) -> str:
        return self.target.region.tensor


@dataclass(frozen=True)
class Plan:
    """What applying `recipe` to `base` will do.

    `steps` are in recipe order; `added` are tensors the base lacks; `resized` those that grow or
    are pruned; `config` the fields of config.json that change; `inputs` the SHA-256 of every file
    the recipe read. `arch` and `tensors` are those edits see: with `added`, already grown, not yet
    pruned; `headers` are those of the files that are written.
    """

    recipe: Recipe
    base: Checkpoint
    arch: Architecture
    edits: tuple[Edit, ...]
    steps: tuple[Step, ...]
    tensors: dict[str, TensorInfo]
    headers: dict[str, Header]
    added: tuple[NewTensor, ...]
    resized: dict[str, Resize]
    config: dict[str, Any]
    inputs: dict[str, str]

    def steps_of(self, tensor: str) -> tuple[Step, ...]:
        return self._by_tensor.get(tensor, ())

    @cached_property
    def _by_tensor(self) -> dict[str, tuple[Step, ...]]:
        # Every band of every tensor asks, and a list of neurons can be thousands of steps.
        found: dict[str, list[Step]] = {}
        for step in self.steps:
            found.setdefault(step.tensor, []).append(step)
        return {tensor: tuple(steps) for tensor, steps in found.items()}

    @property
    def edited(self) -> tuple[str, ...]:
        """Names of the tensors the recipe writes or resizes, in the order of the recipe."""
        return tuple(dict.fromkeys([*(step.tensor for step in self.steps), *self.resized]))

    @property
    def regions(self) -> tuple[Region, ...]:
        """Everything of the tensors that does not stay: what is written, and what is left out."""
        dropped = (
            region
            for tensor, resize in self.resized.items()
            if resize.longer == "before"
            for region in resize.missing(tensor, self.tensors[tensor].shape)
        )
        return tuple(dict.fromkeys([*(step.target.region for step in self.steps), *dropped]))

    def region(self, side: Side, rows: Region) -> Region:
        """Where the band `rows` lies in the tensor of the base, or in the one that is written."""
        resize = self.resized.get(rows.tensor)
        return rows if resize is None else resize.region(side, rows)

    def take(self, side: Side, rows: Region, values: NDArray[Any]) -> NDArray[Any]:
        """What the base has of the band `rows`, or what of it is written."""
        resize = self.resized.get(rows.tensor)
        return values if resize is None else resize.take(side, rows, values)

    def shape(self, side: Side, tensor: str) -> tuple[int, ...]:
        """The shape a tensor had, or has now."""
        shape, resize = self.tensors[tensor].shape, self.resized.get(tensor)
        return shape if resize is None else resize.shape(side, shape)

    def spread(self, rows: Region, stored: NDArray[Any]) -> NDArray[Any]:
        """The band `rows` as edits see it, from what the base has `stored` of it."""
        resize = self.resized.get(rows.tensor)
        return stored if resize is None else resize.spread("before", rows, stored)

    @property
    def edited_bytes(self) -> int:
        """Bytes of every region that is written."""
        return sum(map(self.written_bytes, self.steps))

    def written_bytes(self, step: Step) -> int:
        """Bytes of the region of one step."""
        return step.target.region.size * numpy_dtype(self.tensors[step.tensor].dtype).itemsize

    @property
    def file_bytes(self) -> dict[str, int]:
        """Bytes of each edited weight file."""
        return {file: header.file_size for file, header in self.headers.items()}

    @property
    def disk_bytes(self) -> int:
        """Bytes the edited weight files take."""
        return sum(self.file_bytes.values())

    @property
    def peak_bytes(self) -> int:
        """Upper estimate of the memory weights take: the largest edited tensor as stored, in
        compute dtype before and after, and one temporary of that size."""
        return max((_working_bytes(self.tensors[name]) for name in self.edited), default=0)


def _working_bytes(info: TensorInfo) -> int:
    return info.nbytes + 3 * math.prod(info.shape) * compute_dtype(info.dtype).itemsize


def plan(
    recipe: Path, model: Path, *, allow_outside: bool = False, allow_code: bool = False
) -> Plan:
    """The plan of the recipe file `recipe` on checkpoint folder `model`.

    Raises an `InputError` naming the problem: malformed recipe or checkpoint, an address the
    model lacks, edits that conflict, a tie that would break.
    """
    base = Checkpoint.open(model, allow_code=allow_code)
    return make_plan(load_recipe(recipe, allow_outside=allow_outside), base)


def make_plan(recipe: Recipe, base: Checkpoint) -> Plan:
    """The plan of a loaded recipe on an opened checkpoint; raises `InputError`."""
    arch = identify(base)
    folder = RecipeFolder(recipe)
    edits = tuple(_build(recipe, arch, folder))
    arch, config, grown = _grow(recipe, base, arch, edits)
    added, flags = _layouts(base, arch, edits)
    untied, tie = _untie(recipe, base, arch, edits, tensors_of(new_headers(base, added, grown)))
    added, config = (*added, *untied), config | flags | tie
    tensors = tensors_of(new_headers(base, added, grown))
    arch = extend(arch, base.config | config, [tensor.name for tensor in added])
    steps = _steps(recipe, arch, edits, tensors)
    dropped = {index: edit.drops(arch) for index, edit in enumerate(edits)}
    _refuse_conflicts(recipe, steps, {index for index, bands in dropped.items() if bands})
    resized = _with_cuts(recipe, tensors, grown, dropped)
    headers = new_headers(base, added, resized)
    return Plan(
        recipe, base, arch, edits, steps, tensors, headers, added, resized, config, folder.digests
    )


def _grow(
    recipe: Recipe, base: Checkpoint, arch: Architecture, edits: tuple[Edit, ...]
) -> tuple[Architecture, dict[str, Any], dict[str, Resize]]:
    """The architecture with the sizes that one of the edits makes larger, the config fields that
    say so and the tensors that grow."""
    growing = [index for index, edit in enumerate(edits) if edit.grows()]
    if len(growing) > 1:
        first, second, *_ = growing
        raise EditError(
            f"{recipe.source}: edits[{first}] and edits[{second}] both widen the model; name "
            "everything in one edit, or apply one recipe to what the other gives"
        )
    if not growing:
        return arch, {}, {}
    wide, config = widened(arch, edits[growing[0]].grows())
    grown = {}
    for tensor, axis, by in arch.growth(wide):
        _refuse_dtype(recipe, growing[0], base.info(tensor))
        grown[tensor] = Resize.grown(axis, base.info(tensor).shape[axis], by)
    return wide, config, grown


def _with_cuts(
    recipe: Recipe,
    tensors: Mapping[str, TensorInfo],
    grown: Mapping[str, Resize],
    dropped: Mapping[int, tuple[Band, ...]],
) -> dict[str, Resize]:
    """The `grown` tensors and those that one of the edits prunes, which may not be the same."""
    gone: dict[str, tuple[int, int, set[int]]] = {}
    for edit, bands in dropped.items():
        for band in bands:
            region, axis = band.region, band.axis
            _refuse_dtype(recipe, edit, tensors[region.tensor])
            first, _, indices = gone.setdefault(region.tensor, (edit, axis, set()))
            if first != edit:
                raise EditError(
                    f"{recipe.source}: edits[{first}] and edits[{edit}] both prune "
                    f"{region.tensor!r}; name everything in one edit"
                )
            if region.tensor in grown:
                raise EditError(
                    f"{recipe.source}: prunes {region.tensor!r}, which another edit widens; apply "
                    f"one recipe to what the other gives @ edits[{edit}]"
                )
            indices.update(range(region.start[axis], region.stop[axis]))
    cuts = {
        tensor: Resize.without(axis, tensors[tensor].shape[axis], indices)
        for tensor, (_, axis, indices) in gone.items()
    }
    return {**grown, **cuts}


def _build(recipe: Recipe, arch: Architecture, folder: RecipeFolder) -> Iterator[Edit]:
    for index, fields in enumerate(recipe.edits):
        with _located(recipe, index):
            yield fields.build(arch, folder)


@contextmanager
def _located(recipe: Recipe, index: int) -> Iterator[None]:
    """Adds to errors raised within which edit of which recipe they are about."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{recipe.source}: {error} @ edits[{index}]") from None


def _layouts(
    base: Checkpoint, arch: Architecture, edits: tuple[Edit, ...]
) -> tuple[tuple[NewTensor, ...], dict[str, Any]]:
    added: dict[str, NewTensor] = {}
    config: dict[str, Any] = {}
    for edit in edits:
        layout = edit.layout(arch)
        config |= layout.config
        added |= {addition.name: _new_tensor(base, addition) for addition in layout.additions}
    return tuple(added.values()), config


def _new_tensor(base: Checkpoint, addition: Addition) -> NewTensor:
    beside = base.info(addition.beside)
    source = addition.beside if addition.copy else None
    return NewTensor(addition.name, beside.dtype, addition.shape, beside.file, source)


def _untie(
    recipe: Recipe,
    base: Checkpoint,
    arch: Architecture,
    edits: tuple[Edit, ...],
    tensors: dict[str, TensorInfo],
) -> tuple[tuple[NewTensor, ...], dict[str, Any]]:
    """What it takes to untie the head, if an edit changes a tied embedding; else nothing."""
    embed = arch.name(arch.facts.tie.embed)
    head = arch.name(arch.facts.tie.head)
    targets = _targets(recipe, arch, edits, tensors)
    written = {t.region.tensor for index, t in targets if not edits[index].keeps_tie()}
    if not arch.tied or not written & {embed, head}:
        return (), {}
    if not recipe.untie:
        raise EditError(
            f"{recipe.source}: edits {embed!r}, which is also the output head of this model; "
            "say untie: true to give the head a copy of its own first"
        )
    pairs = {head: embed}
    if arch.facts.tie.bias is not None:
        pairs[arch.name(arch.facts.tie.head, kind="bias")] = arch.name(arch.facts.tie.bias)
    copies = [
        _new_tensor(base, Addition(copy, base.info(source).shape, source, copy=True))
        for copy, source in pairs.items()
        if copy not in base.tensors and source in base.tensors
    ]
    return tuple(copies), {"tie_word_embeddings": False}


def _targets(
    recipe: Recipe, arch: Architecture, edits: tuple[Edit, ...], tensors: dict[str, TensorInfo]
) -> Iterator[tuple[int, Target]]:
    """Every target of every edit with the edit's number."""
    for index, edit in enumerate(edits):
        with _located(recipe, index):
            targets = edit.targets(arch, tensors)
        yield from ((index, target) for target in targets)


def _steps(
    recipe: Recipe, arch: Architecture, edits: tuple[Edit, ...], tensors: dict[str, TensorInfo]
) -> tuple[Step, ...]:
    steps = []
    for index, target in _targets(recipe, arch, edits, tensors):
        name = target.region.tensor
        _refuse_dtype(recipe, index, tensors[name])
        steps.append(Step(index, target, str(arch.roles[name])))
    return tuple(steps)


def _refuse_dtype(recipe: Recipe, edit: int, info: TensorInfo) -> None:
    if info.dtype not in EDITABLE:
        raise EditError(
            f"{recipe.source}: {info.name!r} is stored as {info.dtype}, which cannot "
            f"be edited; editable: {', '.join(EDITABLE)} @ edits[{edit}]"
        )


def _refuse_conflicts(recipe: Recipe, steps: tuple[Step, ...], pruning: set[int]) -> None:
    """Edits of one region need leave to overlap; what an edit of `pruning` takes out no later one
    may change, for nothing of it would be there."""
    grouped: dict[str, dict[int, list[Step]]] = {}
    for step in steps:
        grouped.setdefault(step.tensor, {}).setdefault(step.edit, []).append(step)
    for edits in grouped.values():
        for first, second in combinations(edits.values(), 2):
            pruned = first[0].edit in pruning
            if pruned or not recipe.allow_overlap:
                _refuse_conflict(recipe, first, second, pruned)


def _refuse_conflict(recipe: Recipe, first: list[Step], second: list[Step], pruned: bool) -> None:
    """Compares the regions two edits have in one tensor, each with all of the other at once: a
    list of neurons can be thousands of regions, and pairs of those are millions."""
    start = np.array([step.target.region.start for step in first])
    stop = np.array([step.target.region.stop for step in first])
    for step in second:
        region = step.target.region
        shared = np.minimum(stop, region.stop) > np.maximum(start, region.start)
        for index in np.flatnonzero(shared.all(axis=1)):
            if step.target.conflicts(first[index].target):
                way = (
                    "the first leaves it out; put it last and say allow_overlap: true"
                    if pruned
                    else "say allow_overlap: true to apply them in order"
                )
                raise RecipeError(
                    f"{recipe.source}: edits[{first[index].edit}] and edits[{step.edit}] both "
                    f"change {region}; {way}"
                )
