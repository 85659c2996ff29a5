"""One initializer at a time: which tensors it holds, or how it differs from what it should be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from surgery.arch.interface import Architecture
from surgery.checkpoint import Checkpoint
from surgery.errors import quote
from surgery.export.expressions import Cast, Expression, Fold, Tensor
from surgery.export.lineage import diagnosis
from surgery.export.lineage.catalogue import Catalogue, shaped
from surgery.export.lineage.comparing import equals
from surgery.export.lineage.diagnosis import diagnose, is_turned
from surgery.export.lineage.expected import Expectation, Expectations, fits
from surgery.export.lineage.forms import folds, table_rows
from surgery.export.lineage.linked import Shards, resolve
from surgery.export.lineage.result import (
    AMBIGUOUS,
    CONSTANT,
    MISMATCH,
    PROVEN,
    UNMATCHED,
    Fault,
    Row,
)
from surgery.export.lineage.stored import Stored


@dataclass(frozen=True)
class Traced:
    """An initializer's row and what is wrong with it; `holds` is the tensor it has instead of its
    own, `proven` what it is, bit for bit."""

    row: Row
    faults: tuple[Fault, ...] = ()
    holds: str | None = None
    proven: tuple[Expression, ...] = ()


@dataclass(frozen=True)
class Tracer:
    """Everything known about a checkpoint and a graph before numbers are compared."""

    checkpoint: Checkpoint
    arch: Architecture | None
    catalogue: Catalogue
    expected: Expectations
    shards: Shards
    _equal: dict[Expression, dict[Expression, None]] = field(default_factory=dict)
    """Everything that an expression was found equal to: an initializer that is one is all."""

    def trace(self, stored: Stored) -> Traced:
        """What an initializer is, and whether what is claimed of it is true."""
        traced = self._trace(stored)
        claim = self.expected.claims.get(stored.name)
        if claim is None or traced.faults or self._is_true(claim, stored, traced.proven):
            return traced
        tensor = next(iter(claim.tensors()), None)
        message = "lineage.json says so, and its contents are something else"
        return replace(traced, faults=(_fault(diagnosis.CLAIM, stored, tensor, message),))

    def _is_true(self, claim: Expression, stored: Stored, proven: tuple[Expression, ...]) -> bool:
        """Whether an initializer is what is claimed, with no constants folded in but those that
        its family can have; nothing is compared again that was."""
        allowed = {fold for name in claim.tensors() for fold in self._folds(name)}
        shape = self.catalogue.sampler.shape(claim)
        if shape != stored.shape or not _folded(claim) <= allowed:
            return False
        cast = Cast(claim, stored.dtype.name) if stored.is_float else claim
        known = {tidy(expression, self.checkpoint) for expression in proven}
        return tidy(cast, self.checkpoint) in known or equals(stored, cast, self.checkpoint)

    def _folds(self, tensor: str) -> Iterator[Fold]:
        return folds(self.arch, tensor) if self.arch else iter(())

    def _trace(self, stored: Stored) -> Traced:
        tensors = self.shards.tensors(stored)
        expectation = self.expected.of(stored)
        if tensors is not None:
            return self._by_place(stored, resolve(stored, tensors), expectation)
        if not stored.is_float or not stored.size:
            return self._other(stored, expectation)
        held = self._held(stored, expectation)
        if not held:
            return self._unheld(stored, expectation)
        own = [e for e in held if expectation is None or _shares(e, expectation.expression)]
        if not own and expectation is not None:
            return self._wrong(stored, expectation, held)
        return self._proven(stored, expectation, own, held)

    # ------------------------------------------------------------------------ what it may hold

    def _held(self, stored: Stored, expectation: Expectation | None) -> list[Expression]:
        """Every expression that is the initializer bit for bit, the expected one first."""
        held: dict[Expression, None] = {}
        seen: set[Expression] = set()
        for expression in self._candidates(stored, expectation):
            if expression not in seen and equals(stored, expression, self.checkpoint):
                held[expression] = None
                if expression in self._equal:
                    held.update(self._equal[expression])
                    break
            seen.add(expression)
        self._equal.update((expression, held) for expression in held)
        return list(held)

    def _candidates(self, stored: Stored, expectation: Expectation | None) -> Iterator[Expression]:
        """Those that agree on the sample: what is expected, then whatever is in the catalogue."""
        if expectation is not None:
            wanted = self.forms(stored, expectation.expression)
            yield from (form for form in wanted if self.catalogue.agrees(stored, form))
        yield from self.catalogue.exact(stored)
        if len(stored.shape) > 1 and not self.catalogue.is_constant(stored):
            rows = self._table_rows(stored)
            yield from (form for form in rows if self.catalogue.agrees(stored, form))

    def forms(self, stored: Stored, expression: Expression) -> Iterator[Expression]:
        """The expression, and its tensor with constants folded in, in the initializer's shape:
        the way round that the graph needs first."""
        every: list[Expression] = [expression]
        if isinstance(expression, Tensor):
            every += self._folds(expression.name)
        for form in every:
            shape = self.catalogue.sampler.shape(form)
            ways = [turned for turned in (False, True) if _fits(stored, shape, turned)]
            needed = self.expected.turned(stored, form.tensors()[0])
            for turned in sorted(ways, key=lambda way: way is not bool(needed)):
                yield shaped(form, stored, turned)

    def _table_rows(self, stored: Stored) -> Iterator[Expression]:
        for name, info in self.checkpoint.tensors.items():
            if self.arch is not None and info.shape[1:] == stored.shape[-1:]:
                rows, have = stored.shape[-2], info.shape[0]
                for form in table_rows(self.arch, name, rows, have):
                    if all(size == 1 for size in stored.shape[:-2]):
                        yield shaped(form, stored, False)

    # -------------------------------------------------------------------------- what comes of it

    def _proven(
        self,
        stored: Stored,
        expectation: Expectation | None,
        own: list[Expression],
        held: list[Expression],
    ) -> Traced:
        fault = self._transposed(stored, expectation, own)
        tensors = tuple(dict.fromkeys(name for e in [*own, *held] for name in e.tensors()))
        several = len({e.tensors() for e in held}) > 1
        status = AMBIGUOUS if several and expectation is None else PROVEN
        expression = tidy(own[0], self.checkpoint)
        row = Row.of(stored.name, MISMATCH if fault else status, expression, tensors)
        return Traced(row, (fault,) if fault else (), proven=tuple(held))

    def _transposed(
        self, stored: Stored, expectation: Expectation | None, own: list[Expression]
    ) -> Fault | None:
        """A square matrix that is the wrong way round for the graph that uses it."""
        if len(stored.shape) != 2 or stored.shape[0] != stored.shape[1]:
            return None
        tensor = own[0].tensors()[0]
        needed = self.expected.turned(stored, tensor)
        if needed is None and expectation is not None and expectation.by == "name":
            needed = False
        if needed is None or needed in {is_turned(expression) for expression in own}:
            return None
        return _fault(diagnosis.TRANSPOSED, stored, tensor, "it is the tensor transposed")

    def _wrong(self, stored: Stored, expectation: Expectation, held: list[Expression]) -> Traced:
        """It is some tensor, but another than it should be."""
        if self.catalogue.is_constant(stored):
            return self._unheld(stored, expectation)
        other = held[0].tensors()[0]
        tensor = expectation.expression.tensors()[0]
        fault = _fault(diagnosis.WRONG, stored, tensor, f"it holds {quote(other, 200)} instead")
        row = Row.of(stored.name, MISMATCH, tidy(expectation.expression, self.checkpoint))
        return Traced(row, (fault,), other)

    def _unheld(self, stored: Stored, expectation: Expectation | None) -> Traced:
        """It is no tensor: damaged, of an older model, or nothing to do with weights."""
        target = self._target(stored, expectation)
        if target is None and expectation is not None:
            return self._misshapen(stored, expectation)
        target = target or self.catalogue.near(stored)
        if target is None:
            unmatched = self.catalogue.fits(stored.shape) and not self.catalogue.is_constant(stored)
            return Traced(Row(stored.name, UNMATCHED if unmatched else CONSTANT))
        symptom, message = diagnose(stored, target, self.checkpoint)
        row = Row.of(stored.name, MISMATCH, tidy(target, self.checkpoint))
        return Traced(row, (_fault(symptom, stored, target.tensors()[0], message),))

    def _target(self, stored: Stored, expectation: Expectation | None) -> Expression | None:
        """What an initializer should be compared with: of the forms that fit, the likest."""
        if expectation is None:
            return None
        forms = list(self.forms(stored, expectation.expression))
        return max(forms, key=lambda form: self.catalogue.likeness(stored, form), default=None)

    def _misshapen(self, stored: Stored, expectation: Expectation) -> Traced:
        """Named like a tensor that it cannot be."""
        tensor = expectation.expression.tensors()[0]
        if self.arch is not None and tensor not in self.arch.roles:
            return Traced(Row(stored.name, CONSTANT))
        wanted = list(self.checkpoint.info(tensor).shape)
        message = f"it has the shape {list(stored.shape)}, the tensor {wanted}"
        row = Row.of(stored.name, MISMATCH, expectation.expression)
        return Traced(row, (_fault(diagnosis.SHAPE, stored, tensor, message),))

    def _other(self, stored: Stored, expectation: Expectation | None) -> Traced:
        """An initializer that is not of floats: a constant, unless it has a tensor's name."""
        if expectation is None or not stored.size:
            return Traced(Row(stored.name, CONSTANT))
        expression, tensor = expectation.expression, expectation.expression.tensors()[0]
        alike = self.catalogue.sampler.shape(expression) == stored.shape
        alike = alike and expression.dtype(self.checkpoint) == stored.dtype
        if alike and equals(stored, expression, self.checkpoint):
            return Traced(Row.of(stored.name, PROVEN, expression), proven=(expression,))
        if self.arch is not None and tensor not in self.arch.roles:
            return Traced(Row(stored.name, CONSTANT))
        wanted = self.checkpoint.info(tensor).dtype
        row = Row.of(stored.name, MISMATCH, expression)
        message = f"it is of {stored.dtype.name}, the tensor of {wanted}"
        return Traced(row, (_fault(diagnosis.DTYPE, stored, tensor, message),))

    def _by_place(
        self, stored: Stored, found: str | tuple[str, str, str], expectation: Expectation | None
    ) -> Traced:
        """An initializer that is bytes of the checkpoint itself."""
        wanted = expectation.expression.tensors() if expectation else ()
        if isinstance(found, str):
            same = not wanted or found in wanted or self._same(found, wanted[0])
            if same:
                names = tuple(dict.fromkeys((*wanted[:1], found)))
                row = Row.of(stored.name, PROVEN, Tensor(found), names)
                return Traced(row, proven=tuple(map(Tensor, names)))
            message = f"it is the bytes of {quote(found, 200)} instead"
            fault = _fault(diagnosis.WRONG, stored, wanted[0], message)
            return Traced(Row.of(stored.name, MISMATCH, Tensor(wanted[0])), (fault,), found)
        symptom, near, message = found
        tensor = wanted[0] if wanted else near
        nearest = f"; the nearest tensor is {quote(near, 200)}" if near != tensor else ""
        fault = _fault(symptom, stored, tensor, message + nearest)
        tensors = (tensor,) if tensor else ()
        row = Row(stored.name, MISMATCH, tensors, ("none",) if tensor else ())
        return Traced(row, (fault,))

    def _same(self, one: str, other: str) -> bool:
        """Whether two tensors are equal in every byte, as tied ones are."""
        infos = self.checkpoint.info(one), self.checkpoint.info(other)
        if infos[0].nbytes != infos[1].nbytes or infos[0].dtype != infos[1].dtype:
            return False
        return self.checkpoint.read_bytes(one) == self.checkpoint.read_bytes(other)


def tidy(expression: Expression, checkpoint: Checkpoint) -> Expression:
    """The expression without casts that change nothing."""
    if not isinstance(expression, Cast):
        return expression
    inner = tidy(expression.of, checkpoint)
    if isinstance(inner, Cast) and _is_exact(inner, checkpoint):
        inner = inner.of
    same = inner.dtype(checkpoint).name == expression.to
    return inner if same else Cast(inner, expression.to)


def _is_exact(cast: Cast, checkpoint: Checkpoint) -> bool:
    """Whether every number keeps its value."""
    return cast.to in ("float32", "float64") and cast.of.dtype(checkpoint).itemsize < 4


def _folded(expression: Expression) -> set[Fold]:
    """Every folded constant in an expression."""
    inner = [fold for operand in expression.operands() for fold in _folded(operand)]
    return {*inner, *((expression,) if isinstance(expression, Fold) else ())}


def _fits(stored: Stored, shape: tuple[int, ...], turned: bool) -> bool:
    if not turned:
        return stored.shape == shape
    return len(shape) > 1 and fits(stored.shape, shape) and stored.shape[-2:] == shape[:-3:-1]


def _shares(expression: Expression, other: Expression) -> bool:
    return bool(set(expression.tensors()) & set(other.tensors()))


def _fault(symptom: str, stored: Stored, tensor: str | None, message: str) -> Fault:
    said = f"initializer {quote(stored.name, 200)}"
    should = f" should be {quote(tensor, 200)}" if tensor else ""
    return Fault(symptom, stored.name, tensor, f"{said}{should}: {message}")
