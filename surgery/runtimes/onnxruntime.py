"""ONNX Runtime on the CPU."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from surgery.errors import EnvironmentFault
from surgery.export import onnxfile
from surgery.export.tasks import find_task
from surgery.runtimes import graph
from surgery.runtimes.interface import Arrays, IdArrays, ModelRef, Runtime
from surgery.runtimes.precision import compute_dtype

LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
"""How far a graph is optimised, by the names of `GraphOptimizationLevel`, nothing first."""
CPU = "CPUExecutionProvider"
_REMOTE = ("AzureExecutionProvider",)
_FOLDER_KEY = "session.model_external_initializers_file_folder_path"


class OnnxRuntime(Runtime):
    """An .onnx file in an `InferenceSession`, after `onnxfile.read` accepted it.

    Raises `OnnxError` for a file that is refused or whose inputs cannot be fed.
    """

    def __init__(self, model: ModelRef, threads: int) -> None:
        super().__init__(model, threads)
        onnxruntime.set_default_logger_severity(3)
        self._proto = onnxfile.read(model.path, model.initializers)
        output = find_task(model.task).output
        self._signature = graph.signature(self._proto, output, str(model.path))
        self._session = self._open(model.path)

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(port.name for port in self._signature.ports)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(value.name for value in self._session.get_outputs())

    @property
    def compute(self) -> str:
        return compute_dtype(self._proto)

    def infer_impl(self, inputs: IdArrays, split: int) -> Arrays:
        def run(fed: Arrays) -> Arrays:
            return dict(zip(self.output_names, self._session.run(None, fed), strict=True))

        return graph.infer(self._signature, run, inputs, split)

    def embedding(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        cut, session = self._lookup
        fed = graph.lookup_feed(cut, self._signature.roles, ids)
        rows: NDArray[Any] = session.run(None, fed)[0]
        return rows.reshape(len(ids), -1)

    @cached_property
    def _lookup(self) -> tuple[Any, onnxruntime.InferenceSession]:
        cut = graph.cut_after_embedding(self._proto, self._signature.roles, str(self.model.path))
        return cut, self._open(cut.SerializeToString())

    def _open(self, source: Path | bytes) -> onnxruntime.InferenceSession:
        """A session of a file, or of a model's bytes whose external data stays where it is."""
        folder = self.model.initializers
        if isinstance(source, Path) and folder is None:
            return open_session(str(source), None, self.threads, self.model.level)
        data = source.read_bytes() if isinstance(source, Path) else source
        return open_session(data, folder or self.model.path.parent, self.threads, self.model.level)


def open_session(
    model: str | bytes,
    initializers: Path | None,
    threads: int,
    level: str = "all",
    provider: str = CPU,
) -> onnxruntime.InferenceSession:
    """A session of a file, or of a model's bytes whose external data lies in the folder
    `initializers`; optimised to a `level` of `LEVELS`, on one execution provider.

    Raises `EnvironmentFault` where that provider is not to be had: ONNX Runtime itself would go on
    without it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[level])
    if initializers is not None:
        options.add_session_config_entry(_FOLDER_KEY, str(initializers))
    # What another provider has no kernel for runs on the CPU, as ONNX Runtime does by itself.
    wanted = list(dict.fromkeys((provider, CPU)))
    session = onnxruntime.InferenceSession(model, options, providers=wanted)
    if provider not in session.get_providers():
        raise EnvironmentFault(f"{provider} is not to be had on this machine")
    return session


def other_providers() -> tuple[str, ...]:
    """The execution providers of this build besides the CPU's; those that compute elsewhere, on
    somebody's server, left out."""
    return tuple(p for p in onnxruntime.get_available_providers() if p not in (CPU, *_REMOTE))
