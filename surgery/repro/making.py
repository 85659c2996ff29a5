"""One bundle after the other, each reduced in a child process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery import process
from surgery.arch import Architecture, identify
from surgery.checkpoint import Checkpoint
from surgery.differential import Limits, Pair, Workload
from surgery.errors import EnvironmentFault, SurgeryError
from surgery.evidence import Finding
from surgery.export import export_graph, onnxfile
from surgery.export.lineage import Lineage
from surgery.export.tasks import Task
from surgery.localize.boundaries import find_boundaries, output_of, owners_of
from surgery.localize.result import LIMIT
from surgery.localize.runs import Runs
from surgery.localize.search import output_value
from surgery.repro.caches import after, fed, real
from surgery.runtimes import graph
from surgery.stimuli import Batch
from surgery.taxonomy import fingerprint

Array = NDArray[Any]
_MODULE = "surgery.repro.worker"


@dataclass(frozen=True)
class Wanted:
    """A finding to show: at the boundary of that site on that batch; without a site at an output of
    the model; with neither on the first batch that shows anything."""

    finding: Finding
    site: str = ""
    batch: Batch | None = None


@dataclass(frozen=True)
class Bundle:
    """One written: `problem` is what its script finds wrong, `changed` what the passing model has
    otherwise, empty where there is none, `nodes` how many operators the failing one has."""

    fingerprint: str
    site: str
    message: str
    problem: str
    changed: str
    nodes: int
    bytes: int


@dataclass
class Reproducer:
    """Makes the bundles of one conversion; `scratch` is an empty folder the caller owns."""

    pair: Pair
    task: Task
    workload: Workload
    lineage: Lineage
    scratch: Path
    limits: Limits
    progress: Callable[[str], None] = lambda stage: None

    def __post_init__(self) -> None:
        self._arch: Architecture = identify(Checkpoint.open(self.pair.model))
        self._model = onnxfile.read(self.pair.onnx, self.pair.initializers)
        owners = owners_of(((row.name, row.tensors) for row in self.lineage.rows), self._arch)
        self._boundaries = find_boundaries(self._model.graph, owners, self._arch)
        output = output_value(self._model, self.task.output)
        self._output = output_of(self.task.output, output)
        self._fresh = self._export()
        signature = graph.signature(self._model, self.task.output, str(self.pair.onnx))
        split = [batch for batch in self.workload.batches if batch.split and signature.links]
        self._decoded: list[Batch] = sorted(split, key=_size)

    def make(self, wanted: Wanted, folder: Path) -> Bundle | None:
        """Writes a bundle into the empty `folder`; None where nothing is wrong after all.

        Raises `InputError` for one that would be too large, `EnvironmentFault` where a child ends
        otherwise than it should.
        """
        self.progress(f"bundle of {wanted.finding.site}")
        for site, batch in self._places(wanted):
            told = self._told(wanted.finding, batch)
            job = self._job(site, batch, strict=not wanted.site)
            found = self._child(**job, save=str(folder), told=told)
            if found["problem"]:
                return Bundle(told["fingerprint"], message=wanted.finding.message, **found)
        return None

    def _places(self, wanted: Wanted) -> Iterator[tuple[str, Batch]]:
        """Where it may show, by site and batch; no site is wherever a run goes wrong first, for the
        search that knows no caches has not been there."""
        if wanted.batch is None:
            yield from self._first(wanted.finding)
        elif wanted.site:
            yield wanted.site, at_once(wanted.batch)
        else:
            for batch in (at_once(wanted.batch), *self._decoded):
                yield "" if self.task.cache else self.task.output, batch

    def _told(self, finding: Finding, batch: Batch) -> dict[str, str]:
        split = f", from position {batch.split} on, over PyTorch's caches of those before"
        whole = ", all positions at once" if self.task.cache else ""
        return {
            "fingerprint": fingerprint(finding),
            "where": f"{finding.stage}: {finding.symptom} at {finding.site}",
            "message": self._without_places(finding.message),
            "batch": batch.name + (split if batch.split else whole),
        }

    def _without_places(self, text: str) -> str:
        """Where files lie on this machine is nobody else's."""
        for path in (self.scratch, self.pair.data, self.pair.onnx.parent, self.pair.model):
            for place in (str(path.absolute()), str(path)):
                text = text.replace(f"{place}/", "") if len(place) > 1 else text
        return text

    def _first(self, finding: Finding) -> Iterator[tuple[str, Batch]]:
        """The smallest batch on which the graph as a whole gives no proper output, and which: the
        one that the finding names, where it does; nothing where all are proper."""
        whole = sorted(map(at_once, self.workload.batches), key=_size)
        batches = [*whole, *self._decoded]
        found = self._child(
            action="probe",
            model=str(self.pair.onnx),
            graph=self._graph(),
            batches=[self._save(f"probe-{n}", fed(each, {})) for n, each in enumerate(batches)],
            output=[*finding.site.split("/"), ""][1],
            width=None if self.task.rows else self._width(),
        )
        if found["batch"] is not None:
            yield found["output"], batches[found["batch"]]

    def _width(self) -> int:
        return self._arch.sizes["vocab" if self.task.causal else "width"]

    def _job(self, site: str, batch: Batch, strict: bool) -> dict[str, Any]:
        runs = Runs(self.pair, self.task, batch, self.scratch, self.limits)
        whole, exact = (
            runs.torch(self._boundaries, dtype, caches=self.task.cache)
            for dtype in ("float32", "float64")
        )
        inputs, own, wide = fed(batch, whole), after(batch, whole), after(batch, exact)
        limits = {n: LIMIT * noise(a, wide[n], real(n, a, inputs)) for n, a in own.items()}
        values = {f"v{number}": array for number, array in enumerate(own.values())}
        return {
            "action": "reduce",
            "model": str(self.pair.onnx),
            "graph": self._graph(),
            "fresh": self._fresh,
            "batch": self._save("inputs", inputs),
            "sites": self._save("sites", values),
            "names": list(own),
            "site": site,
            "strict": strict,
            "limits": limits,
        }

    def _graph(self) -> dict[str, Any]:
        values = {b.site: b.value for b in (*self._boundaries, self._output)}
        return _side(self.pair.onnx, self.pair.data, values)

    def _export(self) -> dict[str, Any] | None:
        """A fresh graph of ours; None where none can be made."""
        path = self.scratch / "fresh.onnx"
        try:
            export_graph(self.pair.model, path, task=self.task.name)
            own = onnxfile.read(path, self.pair.model)
        except SurgeryError:
            return None
        names = ((tensor.name, [tensor.name]) for tensor in own.graph.initializer)
        found = find_boundaries(own.graph, owners_of(names, self._arch), self._arch)
        values = {b.site: b.value for b in (*found, output_of(self.task.output))}
        return _side(path, self.pair.model, values)

    def _child(self, **job: Any) -> dict[str, Any]:
        ending = process.run(_MODULE, {**job, "task": self.task.name}, self.scratch, self.limits)
        return ending.value(f"{self.pair.onnx}: a bundle", EnvironmentFault)

    def _save(self, name: str, arrays: Mapping[str, Array]) -> str:
        path = self.scratch.absolute() / f"{name}.npz"
        np.savez(path, allow_pickle=False, **dict(arrays))
        return str(path)


def _side(path: Path, folder: Path, values: Mapping[str, str]) -> dict[str, Any]:
    # A child has another working folder.
    place, data = path.absolute(), folder.absolute()
    return {"path": str(place), "folder": str(data), "values": dict(values)}


def at_once(batch: Batch) -> Batch:
    """With all positions in one run."""
    return replace(batch, split=0)


def _size(batch: Batch) -> int:
    return batch.input_ids.size


def noise(own: Array, wide: Array, real: NDArray[np.bool_]) -> float:
    """The largest difference of PyTorch's float32 and float64 where `real`, no less than a rounding
    of the largest number there."""
    a, b = (array[real].astype(np.float64) for array in (own, wide))
    floor = np.abs(b).max(initial=0.0) * np.finfo(np.float32).eps / 2
    return float(max(np.abs(a - b).max(initial=0.0), floor, 1e-30))
