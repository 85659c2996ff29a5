"""Where a model runs: PyTorch, ONNX Runtime, the ONNX reference evaluator; each in a child.

The streamed ones hold one part of the model at a time and compute the same."""

from __future__ import annotations

from surgery.registry import Registry
from surgery.runtimes.interface import Cut, ModelRef, Runtime

__all__ = ["RUNTIMES", "Cut", "ModelRef", "Runtime"]

RUNTIMES: Registry[type[Runtime]] = Registry(
    "runtime",
    {
        "torch": "surgery.runtimes.pytorch:TorchRuntime",
        "onnxruntime": "surgery.runtimes.onnxruntime:OnnxRuntime",
        "torch-streamed": "surgery.runtimes.streamed_pytorch:StreamedTorch",
        "onnxruntime-streamed": "surgery.runtimes.streamed_onnx:StreamedOnnx",
        "reference": "surgery.runtimes.reference:ReferenceRuntime",
    },
)
