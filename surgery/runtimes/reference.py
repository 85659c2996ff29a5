"""The onnx package's reference evaluator: slow, plain numpy; for small graphs."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.external_data_helper import load_external_data_for_model
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from surgery.runtimes import graph
from surgery.runtimes.attention import ATTENTION
from surgery.runtimes.contrib import CONTRIB
from surgery.runtimes.interface import Arrays, IdArrays, ModelRef
from surgery.runtimes.onnx_model import OnnxModel, Run


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


class ReferenceRuntime(OnnxModel):
    """An .onnx file in `onnx.reference.ReferenceEvaluator`; loads all its weights."""

    def __init__(self, model: ModelRef, threads: int) -> None:
        super().__init__(model, threads)
        home = model.initializers or model.path.parent
        load_external_data_for_model(self._proto, str(home))
        self._run = self._runner(self._proto)

    def infer_impl(self, inputs: IdArrays, split: int) -> Arrays:
        def run(fed: Arrays) -> Arrays:
            return dict(zip(self.output_names, self._run(fed), strict=True))

        return graph.infer(self._signature, run, inputs, split)

    def _runner(self, proto: Any) -> Run:
        return partial(evaluator(proto).run, None)
