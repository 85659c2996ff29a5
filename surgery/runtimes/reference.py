"""The onnx package's reference evaluator: slow, plain numpy; for small graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.external_data_helper import load_external_data_for_model
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from surgery.export import onnxfile
from surgery.export.tasks import find_task
from surgery.runtimes import graph
from surgery.runtimes.attention import ATTENTION
from surgery.runtimes.contrib import CONTRIB
from surgery.runtimes.interface import Arrays, IdArrays, ModelRef, Runtime


class GatherElements(OpRun):  # type: ignore[misc]
    """The package's own one (onnx 1.23) fails on an axis longer than 64, numpy.choose's limit."""

    def _run(self, data: Any, indices: Any, axis: int = 0) -> tuple[NDArray[Any]]:
        own = axis % data.ndim
        sizes = enumerate(indices.shape)
        reach = tuple(slice(None) if n == own else slice(0, size) for n, size in sizes)
        return (np.take_along_axis(data[reach], indices, axis=own),)


def evaluator(model: Any) -> ReferenceEvaluator:
    """The package's evaluator of a ModelProto, with the operators it lacks.

    Outputs that nobody reads are given names: the evaluator would keep one without a name as what
    an input that is left out has.
    """
    for index, node in enumerate(model.graph.node):
        named = enumerate(node.output)
        node.output[:] = [name or f"unread/{index}.{number}" for number, name in named]
    return ReferenceEvaluator(model, new_ops=[GatherElements, *CONTRIB, *ATTENTION])


class ReferenceRuntime(Runtime):
    """An .onnx file in `onnx.reference.ReferenceEvaluator`; loads all its weights."""

    def __init__(self, model: ModelRef, threads: int) -> None:
        super().__init__(model, threads)
        self._proto = onnxfile.read(model.path, model.initializers)
        output = find_task(model.task).output
        self._signature = graph.signature(self._proto, output, str(model.path))
        home = model.initializers or model.path.parent
        load_external_data_for_model(self._proto, str(home))
        self._evaluator = evaluator(self._proto)

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(port.name for port in self._signature.ports)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(self._evaluator.output_names)

    def infer_impl(self, inputs: IdArrays, split: int) -> Arrays:
        def run(fed: Arrays) -> Arrays:
            return dict(zip(self.output_names, self._evaluator.run(None, fed), strict=True))

        return graph.infer(self._signature, run, inputs, split)

    def embedding(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        cut = graph.cut_after_embedding(self._proto, self._signature.roles, str(self.model.path))
        rows = ReferenceEvaluator(cut).run(
            None, graph.lookup_feed(cut, self._signature.roles, ids)
        )[0]
        return np.asarray(rows).reshape(len(ids), -1)
