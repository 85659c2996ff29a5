"""What a family's weights may look like in a graph besides themselves.

Optimisers join the queries, keys and values of a layer into one matrix, exporters cut a fused one
apart, and both fold constants into weights. All of it follows from the family's facts; nothing
else is taken for a form of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np

from surgery.arch.facts import ModuleFact
from surgery.arch.heads import PARTS, head_rows, part_start
from surgery.arch.interface import Architecture
from surgery.arch.roles import Role
from surgery.arch.sizes import evaluate
from surgery.export.expressions import Concat, Expression, Fold, Slice, Stack, Tensor
from surgery.export.parameters import sources

_FUSIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("up_proj", "gate_proj"))
TABLES = ("embed", "position_embed", "type_embed")
"""Roles of tables whose first rows an exporter may keep alone."""


def forms(arch: Architecture) -> Iterator[Expression]:
    """Every expression besides the stored tensors themselves."""
    for tensor, role in arch.roles.items():
        module = arch.facts.modules[role.role]
        if module.parts:
            yield from _parts(arch, Tensor(tensor), role, module)
        yield from folds(arch, tensor)
    for made in sources(arch, "").values():
        yield made
        yield from made.parts if isinstance(made, Stack) else ()
    for roles in _FUSIONS:
        if all(role in arch.facts.modules for role in roles):
            yield from _fusions(arch, roles)


def folds(arch: Architecture, tensor: str) -> Iterator[Fold]:
    """A tensor with the constants of its family folded in: the offset of a norm, the scale of
    attention in queries or keys, that of the embedding."""
    role = arch.roles.get(tensor)
    if role is None:
        return
    of, module = Tensor(tensor), arch.facts.modules[role.role]
    if module.type == "norm" and arch.facts.norm_offset and role.kind == "weight":
        yield Fold(of, offset=float(arch.facts.norm_offset))
    if role.role in ("q_proj", "k_proj"):
        for power in (-0.5, -0.25):
            yield Fold(of, factor=_float32(arch.sizes["head_dim"] ** power))
    if role.role == arch.facts.tie.embed and arch.facts.scaled_embedding:
        root = math.sqrt(arch.width)
        for factor in {_float32(root), float(ml_dtypes.bfloat16(root))}:
            yield Fold(of, factor=factor)


def table_rows(arch: Architecture, tensor: str, rows: int, have: int) -> Iterator[Expression]:
    """The first `rows` rows of a table of `have`, or those after the two that OPT leaves out."""
    role = arch.roles.get(tensor)
    if role is None or role.role not in TABLES:
        return
    for start in (0, 2):
        if start + rows <= have and rows < have:
            yield Slice(Tensor(tensor), 0, start, start + rows)


def _parts(
    arch: Architecture, tensor: Tensor, role: Role, module: ModuleFact
) -> Iterator[Expression]:
    """The parts of a fused projection."""
    axis = _output_axis(module, role.kind)
    for part in module.parts:
        rows = list(_ranges(arch, module, part))
        slices = [Slice(tensor, axis, run.start, run.stop) for run in rows]
        yield slices[0] if len(slices) == 1 else Concat(tuple(slices), axis)


def _ranges(arch: Architecture, module: ModuleFact, part: str) -> Iterator[range]:
    """The outputs that a part takes, in as few runs as there are."""
    if part in PARTS and module.layout == "groups":
        group = arch.sizes["heads"] // arch.sizes["kv_heads"]
        for head in range(0, arch.sizes["heads"], 1 if part == "q" else group):
            yield head_rows(module, part, head, arch.sizes)
    else:
        start = part_start(module, part, arch.sizes)
        yield range(start, start + evaluate(module.parts[part], arch.sizes))


def _fusions(arch: Architecture, roles: Sequence[str]) -> Iterator[Expression]:
    """Projections of one layer joined along their outputs, weights and biases."""
    for layer in arch.layers_of(roles[0]):
        for kind in ("weight", "bias"):
            names = [arch.name(role, layer, kind) for role in roles]
            if all(name in arch.roles for name in names):
                axis = _output_axis(arch.facts.modules[roles[0]], kind)
                yield Concat(tuple(map(Tensor, names)), axis)


def _output_axis(module: ModuleFact, kind: str) -> int:
    return 1 if kind == "weight" and module.type == "conv1d" else 0


def _float32(number: float) -> float:
    return float(np.float32(number))
