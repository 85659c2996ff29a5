"""ONNX Runtime on the CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime

from surgery.runtimes import graph, session
from surgery.runtimes.interface import Arrays, IdArrays, ModelRef
from surgery.runtimes.onnx_model import OnnxModel, Run


class OnnxRuntime(OnnxModel):
    """An .onnx file in an `InferenceSession`."""

    def __init__(self, model: ModelRef, threads: int) -> None:
        super().__init__(model, threads)
        onnxruntime.set_default_logger_severity(3)
        self._session = self._open(model.path)

    def infer_impl(self, inputs: IdArrays, split: int) -> Arrays:
        def run(fed: Arrays) -> Arrays:
            return dict(zip(self.output_names, self._session.run(None, fed), strict=True))

        return graph.infer(self._signature, run, inputs, split)

    def _runner(self, proto: Any) -> Run:
        return partial(self._open(proto.SerializeToString()).run, None)

    def _open(self, source: Path | bytes) -> onnxruntime.InferenceSession:
        """A session of a file, or of a model's bytes whose external data stays where it is."""
        folder, level = self.model.initializers, self.model.level
        if isinstance(source, Path) and folder is None:
            return session.open_session(str(source), None, self.threads, level)
        data = source.read_bytes() if isinstance(source, Path) else source
        home = folder or self.model.path.parent
        return session.open_session(data, home, self.threads, level)
