"""What runtimes of .onnx files share: the graph, what its inputs mean, and its embedding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.export import onnxfile
from surgery.export.tasks import find_task
from surgery.runtimes import graph
from surgery.runtimes.interface import Arrays, ModelRef, Runtime
from surgery.runtimes.precision import compute_dtype

Run = Callable[[Arrays], list[Any]]
"""Computes all outputs of a graph, in order, from its inputs by name."""


class OnnxModel(Runtime):
    """An .onnx file, after `onnxfile.read` accepted it.

    Raises `OnnxError` for a file that is refused or whose inputs cannot be fed.
    """

    def __init__(self, model: ModelRef, threads: int) -> None:
        super().__init__(model, threads)
        self._proto = onnxfile.read(model.path, model.initializers)
        output = find_task(model.task).output
        self._signature = graph.signature(self._proto, output, str(model.path))

    @abstractmethod
    def _runner(self, proto: Any) -> Run:
        """What computes another graph of the file's weights, a ModelProto."""

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(port.name for port in self._signature.ports)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(value.name for value in self._proto.graph.output)

    @property
    def compute(self) -> str:
        return compute_dtype(self._proto)

    def embedding(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        cut, run = self._lookup
        rows = run(graph.lookup_feed(cut, self._signature.roles, ids))[0]
        return np.asarray(rows).reshape(len(ids), -1)

    @cached_property
    def _lookup(self) -> tuple[Any, Run]:
        cut = graph.cut_after_embedding(self._proto, self._signature.roles, str(self.model.path))
        return cut, self._runner(cut)
