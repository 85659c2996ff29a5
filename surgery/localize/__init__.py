"""Where the two runtimes first part: which module brings an error in, and which only pass it on.

Every value at the edge of a module is compared with PyTorch's. Then the graph is run once more with
PyTorch's own values at every one of those edges: what still differs right after an edge was brought
in between, whatever came before it. Putting PyTorch's values in there alone must make the error
vanish everywhere else: that confirms it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.arch import Architecture, identify
from surgery.checkpoint import Checkpoint
from surgery.differential import Limits, Pair
from surgery.errors import quote
from surgery.evidence import Finding
from surgery.export import onnxfile
from surgery.export.lineage import Lineage
from surgery.export.tasks import Task
from surgery.localize.boundaries import OUTPUT, Boundary, find_boundaries, owners_of
from surgery.localize.operators import Operator, find_operator
from surgery.localize.runs import Arrays, Runs
from surgery.stimuli import Batch

LIMIT = 8.0
"""Errors are told in units of noise; the built-in policy allows a conversion this many."""


_MEANING = {
    "translate": "the graph says something else than the model",
    "optimise": "ONNX Runtime gets it right with optimisations off",
    "kernel": "ONNX Runtime computes an operator otherwise than ONNX defines it",
}


@dataclass(frozen=True)
class Row:
    """One boundary: how far ONNX Runtime's value is from PyTorch's, in units of the noise there.

    `error`: in the run as it is; `introduced`: with PyTorch's values at all boundaries before it.
    `noise` is PyTorch float32 against float64, the largest difference; NaN counts as infinite.
    """

    site: str
    value: str
    noise: float
    error: float
    introduced: float

    @property
    def guilty(self) -> bool:
        return self.introduced > LIMIT


@dataclass(frozen=True)
class Fault:
    """A module that brings an error in.

    `confirmed`: with PyTorch's value there, nothing after it is wrong; `stage` is `translate`,
    `optimise` or `kernel`: what of the conversion is at fault; `operator` where it was found.
    """

    site: str
    introduced: float
    confirmed: bool
    stage: str
    operator: Operator | None

    def __str__(self) -> str:
        node = f" at {self.operator}" if self.operator else ""
        sure = "is confirmed" if self.confirmed else "is not confirmed"
        return (
            f"the error comes in at {self.site}{node}, {self.introduced:.3g} times the noise "
            f"({_MEANING[self.stage]}); it {sure} by putting PyTorch's value there"
        )


@dataclass(frozen=True)
class Localization:
    """Every boundary in the order the graph computes them, and what brings errors in."""

    rows: tuple[Row, ...]
    faults: tuple[Fault, ...]
    batch: str

    @property
    def clean(self) -> bool:
        """Whether no boundary is off by more than the limit."""
        return not self.faults and all(row.error <= LIMIT for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def findings(self, corner: str) -> Iterator[Finding]:
        """The faults as findings about `corner`, R_o or R_e."""
        for fault in self.faults:
            site = f"{corner}/{fault.site}"
            message = f"{corner}: {fault}, on {quote(self.batch)}"
            yield Finding(fault.stage, "introduced error", site, message, fault.introduced, LIMIT)


def localize(
    pair: Pair,
    task: Task,
    batch: Batch,
    lineage: Lineage,
    limits: Limits | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Localization:
    """Where ONNX Runtime parts from PyTorch on one batch.

    `lineage` says which initializer of the graph is which tensor, whether it holds its numbers or
    not. Raises `OnnxError` for a file that is refused, `EnvironmentFault` where a run fails.
    """
    arch = identify(Checkpoint.open(pair.model))
    model = onnxfile.read(pair.onnx, pair.initializers)
    owners = owners_of(((row.name, row.tensors) for row in lineage.rows), arch)
    boundaries = find_boundaries(model.graph, owners, arch)
    with tempfile.TemporaryDirectory(prefix="surgery-localize-") as scratch:
        runs = Runs(pair, task, batch, Path(scratch), limits or Limits())
        return _Localizer(runs, arch, model, boundaries, progress).localize()


class _Localizer:
    def __init__(
        self,
        runs: Runs,
        arch: Architecture,
        model: Any,
        boundaries: tuple[Boundary, ...],
        progress: Callable[[str], None],
    ) -> None:
        self._runs, self._arch, self._model = runs, arch, model
        self._boundaries, self._progress = boundaries, progress
        self._output = runs.task.output

    def localize(self) -> Localization:
        self._progress("PyTorch at every boundary")
        self._torch = self._runs.torch(self._boundaries, "float32")
        self._wide = self._runs.torch(self._boundaries, "float64")
        self._progress("ONNX Runtime at every boundary")
        free = self._runs.onnx(self._values())
        self._comparable = [b for b in self._boundaries if self._fits(b, free)]
        given = {b.value: self._shaped(b, free) for b in self._comparable}
        self._progress("ONNX Runtime from PyTorch's values")
        forced = self._runs.onnx(self._values(), given)
        rows = tuple(self._rows(free, forced))
        guilty = [b for b, row in zip(self._edges(), rows, strict=True) if row.guilty]
        return Localization(rows, tuple(self._faults(guilty, rows, given)), self._runs.batch.name)

    def _values(self) -> list[str]:
        return [boundary.value for boundary in self._boundaries]

    def _edges(self) -> list[Boundary]:
        """The boundaries that can be compared, and the graph's own output after them."""
        last = Boundary(self._output, None, OUTPUT, self._output)
        known = {boundary.value for boundary in self._comparable}
        return [*self._comparable, *([] if self._output in known else [last])]

    def _fits(self, boundary: Boundary, free: Arrays) -> bool:
        own = self._torch.get(boundary.site)
        return own is not None and own.size == free[boundary.value].size

    def _shaped(self, boundary: Boundary, free: Arrays) -> NDArray[Any]:
        return self._torch[boundary.site].reshape(free[boundary.value].shape)

    def _rows(self, free: Arrays, forced: Arrays) -> Iterable[Row]:
        for boundary in self._edges():
            own, wide = self._torch[boundary.site], self._wide[boundary.site]
            noise = self._largest(own, wide)
            yield Row(
                boundary.site,
                boundary.value,
                noise,
                self._ratio(free[boundary.value], wide, noise),
                self._ratio(forced[boundary.value], own, noise),
            )

    def _ratio(self, found: NDArray[Any], expected: NDArray[Any], noise: float) -> float:
        if found.size != expected.size:
            return float("inf")
        return self._largest(found.reshape(expected.shape), expected) / noise

    def _largest(self, found: NDArray[Any], expected: NDArray[Any]) -> float:
        """The largest difference at real positions, and no less than a rounding of the largest
        number there; infinite where one is no number."""
        a, b = (self._real(array).astype(np.float64) for array in (found, expected))
        difference = np.abs(a - b).max(initial=0.0)
        floor = np.abs(b).max(initial=0.0) * np.finfo(np.float32).eps / 2
        return float("inf") if np.isnan(difference) else max(float(difference), float(floor), 1e-30)

    def _real(self, array: NDArray[Any]) -> NDArray[Any]:
        mask = self._runs.batch.attention_mask.astype(bool)
        return array[mask] if array.shape[:2] == mask.shape else array

    def _faults(
        self, guilty: list[Boundary], rows: tuple[Row, ...], given: Mapping[str, NDArray[Any]]
    ) -> Iterable[Fault]:
        if not guilty:
            return
        self._progress("confirmation")
        own = {b.value: given[b.value] for b in guilty if b.value in given}
        reset = self._runs.onnx(self._values(), own)
        introduced = {row.site: row.introduced for row in rows}
        healed = self._healed(reset, guilty)
        for boundary in guilty:
            self._progress(f"operator at {boundary.site}")
            yield Fault(
                boundary.site,
                introduced[boundary.site],
                healed,
                self._stage(boundary, given),
                find_operator(self._runs, self._model, boundary, given, self._arch),
            )

    def _healed(self, reset: Arrays, guilty: list[Boundary]) -> bool:
        """Whether nothing but the guilty values themselves is wrong any more."""
        for boundary in self._edges():
            wide = self._wide[boundary.site]
            noise = self._largest(self._torch[boundary.site], wide)
            if boundary not in guilty and self._ratio(reset[boundary.value], wide, noise) > LIMIT:
                return False
        return True

    def _stage(self, boundary: Boundary, given: Mapping[str, NDArray[Any]]) -> str:
        """What of the conversion is at fault, by who else gets it right: nothing optimised, or
        the onnx package's own definitions of the operators."""
        own, wide = self._torch[boundary.site], self._wide[boundary.site]
        noise = self._largest(own, wide)

        def right(values: Arrays) -> bool:
            found = values.get(boundary.value)
            return found is not None and self._ratio(found, own, noise) <= LIMIT

        if right(self._runs.onnx([boundary.value], given, optimised=False)):
            return "optimise"
        return "kernel" if right(self._runs.reference(boundary.value, given)) else "translate"
