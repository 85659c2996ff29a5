"""What an initializer should be: by its name, by the exporter's claim, by the node that uses it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from surgery.arch.interface import Architecture
from surgery.checkpoint import Checkpoint
from surgery.export.expressions import Expression, Tensor
from surgery.export.lineage.sampling import Sampler, turn
from surgery.export.lineage.stored import Stored
from surgery.export.lineage.uses import LOOKUP, PRODUCTS, Use


class Names:
    """Tensors by name, as `names.find_tensor` finds them, looked up and not searched; and under
    the prefix that a wrapper gave the model in place of the file's."""

    def __init__(self, tensors: Mapping[str, object], aliases: Mapping[str, str]) -> None:
        self._names: dict[str, list[str]] = {}
        for tensor in tensors:
            bare = tensor.partition(".")[2]
            self._names.setdefault(bare, []).append(tensor)
        self._known, self._aliases = frozenset(tensors), aliases

    def find(self, name: str) -> str | None:
        """The tensor called `name`, or so but for a prefix that is lacking or another."""
        found = self._find(name)
        return found or self._find(self._aliases.get(name, "")) or self._alias(name)

    def _alias(self, name: str) -> str | None:
        _, _, bare = name.partition(".")
        return self._find(self._aliases.get(bare, ""))

    def _find(self, name: str) -> str | None:
        if name in self._known:
            return name
        _, _, bare = name.partition(".")
        near = [*([bare] if bare in self._known else []), *self._names.get(name, ())]
        near = near or list(self._names.get(bare, ()))
        return near[0] if bare and len(near) == 1 else None


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
        names = Names(self.checkpoint.tensors, dict(_aliases(self.checkpoint, self.arch)))
        object.__setattr__(self, "names", names)

    def of(self, stored: Stored, name: str | None = None) -> Expectation | None:
        """What the initializer should be; None where nothing says it. `name` is the one it had,
        if it was renamed since."""
        named = self.names.find(name or stored.name)
        if named is not None:
            return Expectation(Tensor(named), "name")
        if stored.name in self.claims:
            return Expectation(self.claims[stored.name], "claim")
        used = next(self._used(stored), None)
        return None if used is None else Expectation(Tensor(used), "use")

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

    def _used(self, stored: Stored) -> Iterator[str]:
        """Tensors of the modules that the initializer's users come from, of a shape that fits."""
        for use in self._telling(stored):
            for scope in use.scopes:
                named = self.names.find(f"{scope}.weight")
                if named is not None and fits(stored.shape, self._shape(named)):
                    yield named

    def _shape(self, tensor: str) -> tuple[int, ...]:
        return self.checkpoint.info(tensor).shape


def fits(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes are the same, or are with the last two axes of one swapped."""
    return shape == other or (len(other) > 1 and shape == turn(other))


def _aliases(checkpoint: Checkpoint, arch: Architecture | None) -> Iterator[tuple[str, str]]:
    """What a graph may call a tensor that the file keeps under another name: the tied head."""
    if arch is None:
        return
    tie = arch.facts.tie
    if arch.tied and arch.name(tie.head) not in checkpoint.tensors:
        yield arch.name(tie.head), arch.name(tie.embed)
