"""Weights in 8 bits, by onnxruntime's own dynamic quantisation, in a child process."""

from __future__ import annotations

import tempfile
from pathlib import Path

from surgery import process
from surgery.errors import ExportError
from surgery.export.quiet import quiet

QUANTIZATIONS = ("int8",)
"""`int8`: `onnxruntime.quantization.quantize_dynamic` with signed weights, one scale a tensor."""


def quantize(source: Path, target: Path, limits: process.Limits) -> None:
    """Writes the quantised model `target`, and its data beside it.

    onnxruntime holds all of the model in memory meanwhile. Raises `ExportError` where it fails or
    goes beyond `limits`.
    """
    arguments = {
        "action": "quantize",
        "source": str(source.absolute()),
        "target": str(target.absolute()),
    }
    with tempfile.TemporaryDirectory(prefix="surgery-quantize-") as scratch:
        ending = process.run("surgery.export.worker", arguments, Path(scratch), limits)
    ending.value(f"{target.name}: the quantisation", ExportError)


def quantize_here(source: Path, target: Path) -> None:
    """`quantize`'s work, in the calling process."""
    with quiet():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(source, target, weight_type=QuantType.QInt8, use_external_data_format=True)
