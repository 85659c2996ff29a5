"""What the gate's parts call things."""

from __future__ import annotations

IMPOSSIBLE = "impossible"
"""The symptom of evidence that no run can have measured."""

RUNTIMES = {"T": "PyTorch", "R": "ONNX Runtime"}
