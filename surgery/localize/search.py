"""The search itself: free and forced runs, the confirmation, the stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.arch import Architecture, Role
from surgery.errors import NothingCompared
from surgery.export.lineage import Lineage
from surgery.localize.boundaries import Boundary, find_boundaries, output_of, owners_of
from surgery.localize.operators import Operators
from surgery.localize.referees import Case, Panel, referees
from surgery.localize.result import LIMIT, Fault, Localization, Row
from surgery.localize.runs import Arrays, Runs
from surgery.localize.trial import Operator
from surgery.metrics.distance import UNITS
from surgery.metrics.shape import shape_of
from surgery.runtimes.interface import FLOAT32
from surgery.runtimes.precision import compute_dtype
from surgery.runtimes.segments import segment

Found = tuple[Boundary, Fault]


class Search:
    """One localisation: `lineage` says which initializer of `model` is which tensor."""

    def __init__(
        self,
        runs: Runs,
        arch: Architecture,
        model: Any,
        lineage: Lineage,
        progress: Callable[[str], None],
    ) -> None:
        self._runs, self._arch, self._model = runs, arch, model
        self._lineage, self._progress = lineage, progress
        named = [(row.name, row.tensors) for row in lineage.rows]
        self._owners: dict[str, Role] = owners_of(named, arch)
        self._boundaries = find_boundaries(model.graph, self._owners, arch)
        self._output = output_of(runs.task.output, output_value(model, runs.task.output))
        self._dtype = compute_dtype(model)

    def run(self) -> Localization:
        self._progress("PyTorch at every boundary")
        self._torch = self._runs.torch(self._boundaries, "float32")
        self._wide = self._runs.torch(self._boundaries, "float64")
        same = self._dtype == FLOAT32
        self._noisy = self._torch if same else self._runs.torch(self._boundaries, self._dtype)
        self._check_finite()
        self._progress("ONNX Runtime at every boundary")
        free = self._runs.onnx(self._values())
        self._comparable = [b for b in self._boundaries if self._fits(b, free)]
        given = {b.value: self._shaped(b, free) for b in self._comparable}
        self._progress("ONNX Runtime from PyTorch's values")
        forced = self._runs.onnx(self._values(), given)
        rows = tuple(self._rows(free, forced))
        guilty = [b for b, row in zip(self._edges(), rows, strict=True) if row.guilty]
        faults = tuple(grouped(self._faults(guilty, rows, given, forced)))
        left_out = tuple(b.site for b in self._boundaries if b not in self._comparable)
        note = self._note(rows, faults)
        return Localization(rows, faults, self._runs.batch.name, left_out, note)

    def _note(self, rows: tuple[Row, ...], faults: tuple[Fault, ...]) -> str:
        if not self._comparable:
            return (
                "no value of the graph is known to be one at a module's boundary, so the output "
                "alone was compared"
            )
        if not faults and any(row.error > LIMIT for row in rows):
            return f"every module by itself stays within {LIMIT:g} times the noise"
        return ""

    def _values(self) -> list[str]:
        return [boundary.value for boundary in (*self._boundaries, self._output)]

    def _edges(self) -> list[Boundary]:
        """The boundaries that can be compared, and the graph's own output after them."""
        known = {boundary.value for boundary in self._comparable}
        last = [] if self._output.value in known else [self._output]
        return [*self._comparable, *last]

    def _check_finite(self) -> None:
        for site, array in self._torch.items():
            if not np.isfinite(self._real(array)).all():
                batch = self._runs.batch.name
                raise NothingCompared(
                    f"{self._runs.pair.model}: PyTorch itself gives numbers that are not finite "
                    f"at {site} on {batch}, so nothing can be compared with it"
                )

    def _fits(self, boundary: Boundary, free: Arrays) -> bool:
        own = self._torch.get(boundary.site)
        return own is not None and own.size == free[boundary.value].size

    def _shaped(self, boundary: Boundary, free: Arrays) -> NDArray[Any]:
        return self._torch[boundary.site].reshape(free[boundary.value].shape)

    def _rows(self, free: Arrays, forced: Arrays) -> Iterable[Row]:
        for boundary in self._edges():
            own, wide = self._torch[boundary.site], self._wide[boundary.site]
            noise = self._noise(boundary)
            yield Row(
                boundary.site,
                boundary.value,
                noise,
                self._ratio(free[boundary.value], wide, noise),
                self._ratio(forced[boundary.value], own, noise),
                *self._shape(boundary, free[boundary.value]),
            )

    def _noise(self, boundary: Boundary) -> float:
        return self._largest(self._noisy[boundary.site], self._wide[boundary.site])

    def _shape(self, boundary: Boundary, found: NDArray[Any]) -> tuple[float, float] | tuple[()]:
        """Overlap and sigma ratio of error and noise; nothing where they do not compare."""
        wide = self._wide[boundary.site]
        if found.size != wide.size:
            return ()
        noisy, own, exact = (
            self._rows_of(array.reshape(wide.shape))
            for array in (self._noisy[boundary.site], found, wide)
        )
        return shape_of(noisy, own, exact, UNITS[self._dtype])

    def _rows_of(self, array: NDArray[Any]) -> NDArray[np.float64]:
        real = self._real(array).astype(np.float64)
        return real.reshape(len(real), -1)

    def _ratio(self, found: NDArray[Any], expected: NDArray[Any], noise: float) -> float:
        if found.size != expected.size:
            return float("inf")
        return self._largest(found.reshape(expected.shape), expected) / noise

    def _largest(self, found: NDArray[Any], expected: NDArray[Any]) -> float:
        """The largest difference at real positions, and no less than a rounding of the largest
        number there; infinite where one is no number."""
        a, b = (self._real(array).astype(np.float64) for array in (found, expected))
        if not np.isfinite(a).all():
            return float("inf")
        difference = float(np.abs(a - b).max(initial=0.0))
        floor = float(np.abs(b).max(initial=0.0) * UNITS[self._dtype])
        return max(difference, floor, 1e-30)

    def _real(self, array: NDArray[Any]) -> NDArray[Any]:
        mask = self._runs.batch.attention_mask.astype(bool)
        return array[mask] if array.shape[:2] == mask.shape else array

    def _faults(
        self,
        guilty: list[Boundary],
        rows: tuple[Row, ...],
        given: Mapping[str, NDArray[Any]],
        forced: Arrays,
    ) -> Iterator[Found]:
        if not guilty:
            return
        self._progress("confirmation")
        introduced = {row.site: row.introduced for row in rows}
        healed = self._healed(guilty, given)
        panel = self._panel(guilty, given, forced)
        every = (*self._boundaries, self._output)
        operators = Operators(self._runs, self._arch, self._model, every, given, self._lineage)
        for boundary in guilty:
            self._progress(f"operator at {boundary.site}")
            operator = operators.find(boundary, self._judge(boundary))
            self._progress(f"referees at {boundary.site}")
            verdict = panel.judge(boundary, _explained(operator))
            yield (
                boundary,
                Fault(
                    boundary.site,
                    introduced[boundary.site],
                    healed,
                    verdict.stage,
                    operator,
                    within=self._within(boundary, given),
                    referees=verdict.rulings,
                    note=verdict.note,
                ),
            )

    def _healed(self, guilty: list[Boundary], given: Mapping[str, NDArray[Any]]) -> bool:
        """Whether nothing is wrong any more with PyTorch's values at the guilty boundaries, or at
        all of their kind: elsewhere the same cause may stay below the limit by itself. Norms are
        tried as one kind too, since they share what is added to a variance."""
        wider = (lambda b: (b.role, b.side), self._kind)
        alike = ([b for b in self._edges() if kind(b) in set(map(kind, guilty))] for kind in wider)
        return any(self._right_with(reset, given) for reset in (guilty, *alike))

    def _kind(self, boundary: Boundary) -> tuple[str, str]:
        module = self._arch.facts.modules.get(boundary.role)
        is_norm = module is not None and module.type == "norm"
        return "norm" if is_norm else boundary.role, boundary.side

    def _right_with(self, reset: list[Boundary], given: Mapping[str, NDArray[Any]]) -> bool:
        """Whether every other boundary is right with PyTorch's values at those of `reset`."""
        own = {b.value: given[b.value] for b in reset if b.value in given}
        found = self._runs.onnx(self._values(), own)
        others = [b for b in self._edges() if b not in reset]
        return bool(others) and all(self._is_right(b, found[b.value]) for b in others)

    def _is_right(self, boundary: Boundary, found: NDArray[Any]) -> bool:
        """Whether a value of a run is PyTorch's to within the limit."""
        return self._ratio(found, self._wide[boundary.site], self._noise(boundary)) <= LIMIT

    def _judge(self, boundary: Boundary) -> Callable[[NDArray[Any]], bool]:
        own, noise = self._torch[boundary.site], self._noise(boundary)
        return lambda found: self._ratio(found, own, noise) <= LIMIT

    def _panel(
        self, guilty: list[Boundary], given: Mapping[str, NDArray[Any]], forced: Arrays
    ) -> Panel:
        case = Case(self._runs, tuple(self._edges()), self._torch, given, forced)
        return Panel(case, referees(), guilty, self._apart, LIMIT)

    def _apart(self, boundary: Boundary, one: NDArray[Any], other: NDArray[Any]) -> float:
        return self._ratio(one, other, self._noise(boundary))

    def _within(self, boundary: Boundary, given: Mapping[str, Any]) -> tuple[str, ...]:
        """The experts whose weights are read before a boundary and after those before it."""
        nodes = segment(self._model, [boundary.value], set(given))
        read = {name for node in nodes for name in node.input}
        owners = [role for name, role in self._owners.items() if name in read]
        experts = {f"{r.role}.{r.layer}" for r in owners if "expert" in r.role}
        return tuple(sorted(experts))


def _explained(operator: Operator | None) -> str:
    """Why no capture can be at fault: it is made of a config, which holds no weight."""
    named = operator is not None and operator.tensors
    return "a weight is not the checkpoint's" if named else ""


def grouped(found: Iterable[Found]) -> Iterator[Fault]:
    """Faults of one cause as one, the first, with the other boundaries beside it."""
    groups: dict[tuple[Any, ...], list[Fault]] = {}
    for boundary, fault in found:
        groups.setdefault(_cause(boundary, fault), []).append(fault)
    for first, *others in groups.values():
        also = tuple(fault.site for fault in others)
        yield Fault(**{**vars(first), "also": also})


def _cause(boundary: Boundary, fault: Fault) -> tuple[Any, ...]:
    """One initializer, one tensor or one node; else one kind of node in one kind of module."""
    operator: Operator | None = fault.operator
    if operator is not None and (operator.tensors or operator.constant):
        return fault.stage, operator.tensors, operator.constant
    if operator is not None and operator.confirmed and operator.value != boundary.value:
        return fault.stage, boundary.role, boundary.side, operator.kind, operator.reason
    kind = (operator.kind, operator.reason) if operator is not None else ()
    return fault.stage, boundary.role, boundary.side, *kind


def output_value(model: Any, output: str) -> str:
    """What a ModelProto calls the task's output: by name, else the first of rank 3, which is
    what a run takes for it."""
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.output}
    known = [output] if output in ranks else [name for name, rank in ranks.items() if rank == 3]
    return (known or list(ranks))[0]
