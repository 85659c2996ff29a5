"""What an initializer should be: by its name, by the exporter's claim, by the node that uses it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from surgery.arch.interface import Architecture
from surgery.checkpoint import Checkpoint
from surgery.export.expressions import Expression, Stack, Tensor, item
from surgery.export.lineage.sampling import Sampler, turn
from surgery.export.lineage.stored import Stored
from surgery.export.lineage.uses import LOOKUP, PRODUCTS, Use
from surgery.export.parameters import sources

_SUFFIXES = 3
"""As many names are tried: the whole one, and it without one or both of its endings."""
_ENTRY = re.compile(r"[0-9]{1,6}")


class Names:
    """What names in a graph mean: tensors, and what a model in memory makes of them.

    A prefix may be lacking on either side, or be another; a name that could mean two means none.
    """

    def __init__(self, known: Mapping[str, Expression]) -> None:
        self._known, self._bare = known, defaultdict[str, list[str]](list)
        for name in known:
            self._bare[name.partition(".")[2]].append(name)

    def find(self, name: str) -> Expression | None:
        """What the initializer `name` should be; also where it is `X.T`, `X.3` of a stack X, or
        `X.T.3`."""
        entry: int | None = None
        for _ in range(_SUFFIXES):
            found = self._find(name)
            if found is not None:
                return found if entry is None else _entry(found, entry)
            name, _, last = name.rpartition(".")
            if _ENTRY.fullmatch(last) and entry is None:
                entry = int(last)
            elif last != "T":
                return None
        return None

    def _find(self, name: str) -> Expression | None:
        _, _, bare = name.partition(".")
        near = [name] if name in self._known else [bare] if bare in self._known else []
        near = near or self._bare.get(name, []) or (self._bare.get(bare, []) if bare else [])
        found = {self._known[other] for other in near}
        return found.pop() if len(found) == 1 else None


def _entry(whole: Expression, index: int) -> Expression | None:
    is_entry = isinstance(whole, Stack) and index < len(whole.parts)
    return item(whole, index) if is_entry else None


@dataclass(frozen=True)
class Expectation:
    """What an initializer should hold, and who says so: `name`, `claim` or `use`."""

    expression: Expression
    by: str


@dataclass(frozen=True)
class Expectations:
    """Everything that says what initializers should be."""

    checkpoint: Checkpoint
    arch: Architecture | None
    sampler: Sampler
    uses: Mapping[str, Sequence[Use]]
    claims: Mapping[str, Expression]
    names: Names = field(init=False)

    def __post_init__(self) -> None:
        names = Names(in_memory(self.checkpoint, self.arch))
        object.__setattr__(self, "names", names)

    def of(self, stored: Stored, name: str | None = None) -> Expectation | None:
        """What the initializer should be; None where nothing says it. `name` is the one it had,
        if it was renamed since."""
        named = self.names.find(name or stored.name)
        if named is not None:
            return Expectation(named, "name")
        if stored.name in self.claims:
            return Expectation(self.claims[stored.name], "claim")
        used = next(self._used(stored), None)
        return None if used is None else Expectation(used, "use")

    def turned(self, stored: Stored, tensor: str) -> bool | None:
        """Whether the graph needs the tensor's matrix transposed in the initializer; None where
        its use does not tell."""
        role = self.arch.roles.get(tensor) if self.arch else None
        if role is None or self.arch is None or len(stored.shape) != 2:
            return None
        conv1d = self.arch.facts.modules[role.role].type == "conv1d"
        needs = {use.transposed ^ self._turned(use, conv1d) for use in self._telling(stored)}
        return needs.pop() if len(needs) == 1 else None

    def _telling(self, stored: Stored) -> Iterator[Use]:
        for use in self.uses.get(stored.name, ()):
            if (use.op == LOOKUP and use.operand == 0) or (use.op in PRODUCTS and use.operand == 1):
                yield use

    def _turned(self, use: Use, conv1d: bool) -> bool:
        """Whether what the operator sees is the stored matrix transposed: y = xWᵀ of a Linear."""
        return use.op in PRODUCTS and not conv1d

    def _used(self, stored: Stored) -> Iterator[Expression]:
        """Tensors of the modules that the initializer's users come from, of a shape that fits."""
        for use in self._telling(stored):
            for scope in use.scopes:
                named = self.names.find(f"{scope}.weight")
                if named is not None and fits(stored.shape, self.sampler.shape(named)):
                    yield named


def fits(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes are the same, or are with the last two axes of one swapped."""
    return shape == other or (len(other) > 1 and shape == turn(other))


def in_memory(checkpoint: Checkpoint, arch: Architecture | None) -> dict[str, Expression]:
    """Every name that a tensor, or what a model in memory makes of some, can have."""
    known: dict[str, Expression] = {name: Tensor(name) for name in checkpoint.tensors}
    if arch is None:
        return known
    for prefix in arch.facts.prefixes:
        known = {**sources(arch, prefix), **known}
    tie = arch.facts.tie
    if arch.tied and arch.name(tie.head) not in checkpoint.tensors:
        known[arch.name(tie.head)] = Tensor(arch.name(tie.embed))
    return known
