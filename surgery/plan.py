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
from surgery.arch import Architecture, Band, extend, identify
from surgery.checkpoint import Checkpoint, Header, TensorInfo
from surgery.checkpoint.dtypes import EDITABLE, compute_dtype, numpy_dtype
from surgery.checkpoint.layout import Cut, NewTensor, new_headers, tensors_of
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

    `steps` are in recipe order; `added` are tensors the base lacks; `cuts` is what is left of
    those that are pruned; `config` the fields of config.json that change; `inputs` the SHA-256 of
    every file the recipe read. `arch` and `tensors` are those edits see, with `added` and before
    `cuts`; `headers` are those of the files that are written.
    """

    recipe: Recipe
    base: Checkpoint
    arch: Architecture
    edits: tuple[Edit, ...]
    steps: tuple[Step, ...]
    tensors: dict[str, TensorInfo]
    headers: dict[str, Header]
    added: tuple[NewTensor, ...]
    cuts: dict[str, Cut]
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
        """Names of the tensors the recipe writes or prunes, in the order of the recipe."""
        return tuple(dict.fromkeys([*(step.tensor for step in self.steps), *self.cuts]))

    @property
    def regions(self) -> tuple[Region, ...]:
        """Everything of the tensors that does not stay: what is written, and what is left out."""
        dropped = (
            region
            for tensor, cut in self.cuts.items()
            for region in cut.dropped(tensor, self.tensors[tensor].shape)
        )
        return tuple(dict.fromkeys([*(step.target.region for step in self.steps), *dropped]))

    def left(self, rows: Region) -> Region:
        """Where the band `rows` lies in the tensor as it is written."""
        cut = self.cuts.get(rows.tensor)
        return rows if cut is None else cut.left(rows)

    def take(self, rows: Region, values: NDArray[Any]) -> NDArray[Any]:
        """What of the band `rows` is written."""
        cut = self.cuts.get(rows.tensor)
        return values if cut is None else cut.take(rows, values)

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
    added, config = _layouts(base, arch, edits)
    untied = _untie(recipe, base, arch, edits, tensors_of(new_headers(base, added, {})))
    added, config = (*added, *untied[0]), config | untied[1]
    tensors = tensors_of(new_headers(base, added, {}))
    arch = extend(arch, base.config | config, [tensor.name for tensor in added])
    steps = _steps(recipe, arch, edits, tensors)
    dropped = {index: edit.drops(arch) for index, edit in enumerate(edits)}
    _refuse_conflicts(recipe, steps, {index for index, bands in dropped.items() if bands})
    cuts = _cuts(recipe, tensors, dropped)
    headers = new_headers(base, added, cuts)
    return Plan(
        recipe, base, arch, edits, steps, tensors, headers, added, cuts, config, folder.digests
    )


def _cuts(
    recipe: Recipe, tensors: Mapping[str, TensorInfo], dropped: Mapping[int, tuple[Band, ...]]
) -> dict[str, Cut]:
    """What is left of every tensor that one of the edits prunes."""
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
            indices.update(range(region.start[axis], region.stop[axis]))
    return {
        tensor: Cut.without(axis, tensors[tensor].shape[axis], indices)
        for tensor, (_, axis, indices) in gone.items()
    }


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
