"""Where a model runs: PyTorch, ONNX Runtime, the ONNX reference evaluator; each in a child."""

from __future__ import annotations

from surgery.registry import Registry
from surgery.runtimes.interface import ModelRef, Runtime

__all__ = ["RUNTIMES", "ModelRef", "Runtime"]

RUNTIMES: Registry[type[Runtime]] = Registry(
    "runtime",
    {
        "torch": "surgery.runtimes.pytorch:TorchRuntime",
        "onnxruntime": "surgery.runtimes.onnxruntime:OnnxRuntime",
        "reference": "surgery.runtimes.reference:ReferenceRuntime",
    },
)
