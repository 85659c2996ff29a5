"""A bound graph on disk: `model.onnx`, `model.onnx.data` and a sealed note of what they are."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from surgery.checkpoint import EXPORT_RECEIPT, Checkpoint, Staging
from surgery.checkpoint.files import sha256_file
from surgery.checkpoint.receipt import EXPORT_PREDICATE, seal, statement
from surgery.export.onnxfile import check
from surgery.export.quiet import quiet

MODEL = "model.onnx"
DATA = "model.onnx.data"
_PACKAGES = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy")


def write(model: Any, output: Path, source: Path, facts: dict[str, Any]) -> dict[str, int]:
    """Write a bound `onnx_ir.Model` to the new folder `output`; returns file name to bytes.

    `facts` (JSON values) go into `surgery-export.json`, beside the digests of the written files
    and of the weight files of the checkpoint `source`. Everything is staged beside `output`,
    accepted by onnx.checker and onnxruntime there, then renamed: `output` appears whole or not
    at all. Raises `OutputError` for an occupied output, `OnnxError` when a check refuses.
    """
    with Staging(output, sources=(source,)) as staging:
        _save(model, staging.path / MODEL)
        check(staging.path / MODEL, session=True)
        written = [name for name in (MODEL, DATA) if (staging.path / name).exists()]
        digests = {name: sha256_file(staging.path / name) for name in written}
        predicate = {**facts, "source": _source_digests(source), "versions": _versions()}
        staging.write(EXPORT_RECEIPT, seal(statement(digests, EXPORT_PREDICATE, predicate)))
        sizes = {name: (staging.path / name).stat().st_size for name in (*written, EXPORT_RECEIPT)}
        staging.commit()
    return sizes


def _save(model: Any, path: Path) -> None:
    import onnx_ir

    with quiet():
        onnx_ir.save(model, path, external_data=DATA)


def _source_digests(source: Path) -> dict[str, str]:
    checkpoint = Checkpoint.open(source)
    return {name: sha256_file(checkpoint.path(name)) for name in checkpoint.weight_files}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
