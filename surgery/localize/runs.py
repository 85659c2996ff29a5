"""The runs of a localisation, each in a child process: PyTorch twice, ONNX Runtime as asked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery import process
from surgery.differential import Pair
from surgery.errors import EnvironmentFault
from surgery.export.tasks import Task
from surgery.localize.boundaries import Boundary
from surgery.runtimes.child import default_threads
from surgery.stimuli import Batch

Arrays = dict[str, NDArray[Any]]


@dataclass
class Runs:
    """One batch through the models of one pair; `scratch` is an empty folder the caller owns."""

    pair: Pair
    task: Task
    batch: Batch
    scratch: Path
    limits: process.Limits
    _count: int = 0

    def torch(
        self,
        boundaries: Sequence[Boundary],
        dtype: str,
        given: Mapping[str, NDArray[Any]] | None = None,
        *,
        caches: bool = False,
    ) -> Arrays:
        """What crosses each boundary in PyTorch, by site, and the task's output; with the values
        of `given`, by site too, read on in place of what is computed there. With `caches`, all
        `present.N.key|value` as well."""
        return self._run(
            action="torch",
            model=str(self.pair.model.absolute()),
            dtype=dtype,
            boundaries=[asdict(boundary) for boundary in boundaries],
            given=self._save("given", dict(given or {})),
            caches=caches,
        )

    def exported(self, boundaries: Sequence[Boundary], given: Mapping[str, NDArray[Any]]) -> Arrays:
        """As `torch`, by the program that torch.export captures of the model; a boundary that
        the program has not is left out."""
        return self._run(
            action="exported",
            model=str(self.pair.model.absolute()),
            boundaries=[asdict(boundary) for boundary in boundaries],
            given=self._save("given", dict(given)),
        )

    def onnx(
        self,
        values: Collection[str],
        given: Mapping[str, NDArray[Any]] | None = None,
        *,
        graph: Path | None = None,
        optimised: bool = True,
        level: str = "all",
        provider: str = "",
    ) -> Arrays:
        """`values` of the ONNX graph, and its outputs, with those of `given` in place of what it
        computes; of another `graph` of the same checkpoint, whose data is the checkpoint's.

        Not `optimised` is the `level` of optimisation `disabled`; no `provider` is the CPU's.
        """
        own = self.pair.onnx if graph is None else graph
        folder = self.pair.data if graph is None else self.pair.model
        return self._run(
            action="onnx",
            model=str(own.absolute()),
            initializers=str(folder.absolute()),
            values=list(values),
            given=self._save("given", dict(given or {})),
            level=level if optimised else "disabled",
            provider=provider,
        )

    def reference(
        self, values: Collection[str], given: Mapping[str, NDArray[Any]]
    ) -> tuple[Arrays, dict[str, str]]:
        """Each of `values` of the ONNX graph from those of `given` before it, by the onnx
        package's evaluator; and why, of those that it cannot compute."""
        found, told = self._child(
            action="reference",
            model=str(self.pair.onnx.absolute()),
            initializers=str(self.pair.data.absolute()),
            values=list(values),
            given=self._save("given", dict(given)),
        )
        return found, told["problems"]

    def _run(self, **job: Any) -> Arrays:
        return self._child(**job)[0]

    def _child(self, **job: Any) -> tuple[Arrays, dict[str, Any]]:
        self._count += 1
        save = self.scratch / f"values-{self._count}.npz"
        job |= {
            "task": self.task.name,
            "threads": default_threads(),
            "batch": self._save("batch", dict(self.batch.inputs())),
            "save": str(save),
        }
        ending = process.run("surgery.localize.worker", job, self.scratch, self.limits)
        told = ending.value(f"{self.pair.onnx}: a run of the localisation", EnvironmentFault)
        with np.load(save, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}, told

    def _save(self, name: str, arrays: Arrays) -> str:
        path = self.scratch / f"{name}-{self._count}.npz"
        np.savez(path, allow_pickle=False, **arrays)
        return str(path)
