"""A bound graph on disk, with what says what it is: `surgery-export.json` and `lineage.json`."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery.checkpoint import EXPORT_RECEIPT, Checkpoint, Staging
from surgery.checkpoint.files import sha256_file
from surgery.checkpoint.receipt import (
    EXPORT_PREDICATE,
    MalformedReceipt,
    canonical,
    open_receipt,
    seal,
    statement,
    subjects,
)
from surgery.checkpoint.staging import lock, sync
from surgery.errors import OutputError
from surgery.export.bind import unused
from surgery.export.cache import versions
from surgery.export.capture import PARAMETERS, PREFIX
from surgery.export.fold import Expressions
from surgery.export.layouts.interface import LINEAGE, MODEL, Request, Stages
from surgery.export.onnxfile import check, check_here
from surgery.export.quiet import quiet

DATA = f"{MODEL}.data"
_HIDDEN = ".surgery-export-"
_PACKAGES = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy")


def write_folder(model: Any, bound: Expressions, request: Request, stage: Stages) -> dict[str, int]:
    """Write a bound `onnx_ir.Model` with its own data to the new folder `request.output`.

    Everything is staged beside it, accepted by onnx.checker and onnxruntime there, then renamed:
    the folder appears whole or not at all. Returns file name to bytes. Raises `OutputError` for
    an occupied output, `OnnxError` when a check refuses.
    """
    import onnx_ir

    _forget(model)
    with Staging(request.output, sources=(request.checkpoint.root,)) as staging:
        with quiet():
            onnx_ir.save(model, staging.path / MODEL, external_data=DATA)
        stage("check")
        check(staging.path / MODEL, session=True)
        staging.write(LINEAGE, lineage_text(bound, request.checkpoint))
        written = [name for name in (MODEL, DATA, LINEAGE) if (staging.path / name).exists()]
        digests = {name: sha256_file(staging.path / name) for name in written}
        checkpoint = request.checkpoint
        source = {file: sha256_file(checkpoint.path(file)) for file in checkpoint.weight_files}
        staging.write(EXPORT_RECEIPT, _receipt(digests, request, "portable", source, bound))
        sizes = {name: (staging.path / name).stat().st_size for name in (*written, EXPORT_RECEIPT)}
        staging.commit()
    return sizes


def place_beside(model: Any, bound: Expressions, request: Request) -> dict[str, int]:
    """Write a graph that points into the checkpoint's shards into the checkpoint's own folder.

    The receipt is put in place first and names what follows, so that a run stopped in between is
    seen, and healed by the next. Returns file name to bytes. Raises `OutputError` where a model
    is there already, `OnnxError` when onnx.checker refuses the graph.
    """
    import onnx_ir

    checkpoint = request.checkpoint
    _forget(model)
    with quiet():
        graph = onnx_ir.to_proto(model).SerializeToString(deterministic=True)
    files = {MODEL: graph, LINEAGE: lineage_text(bound, checkpoint)}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    receipt = _receipt(digests, request, "linked", _headers(checkpoint), bound)
    files = {EXPORT_RECEIPT: receipt, **files}
    with lock(checkpoint.root), _scratch(checkpoint.root) as scratch:
        _refuse_occupied(checkpoint.root)
        for name, data in files.items():
            (scratch / name).write_bytes(data)
            sync(scratch / name)
        check_here(scratch / MODEL, checkpoint.root, session=False)
        for name in files:
            (scratch / name).replace(checkpoint.root / name)
        sync(checkpoint.root)
    return {name: len(data) for name, data in files.items()}


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A hidden folder inside `folder`; those that stopped runs left are removed, under the lock."""
    for left in folder.glob(f"{_HIDDEN}*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix=_HIDDEN, dir=folder) as scratch:
            yield Path(scratch)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from None


def lineage_text(bound: Expressions, checkpoint: Checkpoint) -> bytes:
    """`lineage.json`: what each initializer is made of, and which tensors no initializer reads."""
    return canonical(
        {
            "schema": 1,
            "initializers": {name: e.to_json() for name, e in sorted(bound.items())},
            "unused": unused(checkpoint, bound),
        }
    )


def _refuse_occupied(folder: Path) -> None:
    """Raises `OutputError` where an export is there, but not where one was stopped half-way."""
    receipt = folder / EXPORT_RECEIPT
    try:
        named = subjects(open_receipt(receipt, EXPORT_PREDICATE), receipt)
        if not all((folder / name).exists() for name in named):
            return
    except (MalformedReceipt, FileNotFoundError):
        named = {}
    for name in (MODEL, LINEAGE, EXPORT_RECEIPT):
        if (folder / name).exists():
            raise OutputError(f"{folder / name}: is there already; remove it to export again")


def _receipt(
    digests: dict[str, str],
    request: Request,
    layout: str,
    source: dict[str, Any],
    bound: Expressions,
) -> bytes:
    predicate = {
        "task": request.task,
        "opset": request.opset,
        "dtype": request.dtype,
        "layout": layout,
        "unused": list(unused(request.checkpoint, bound)),
        "source": source,
        "versions": versions(_PACKAGES),
    }
    return seal(statement(digests, EXPORT_PREDICATE, predicate))


def _headers(checkpoint: Checkpoint) -> dict[str, Any]:
    """Digest of each shard's header, which says where its tensors lie, and the file's size."""
    return {
        shard: {"header": hashlib.sha256(header.raw).hexdigest(), "bytes": header.file_size}
        for shard, header in checkpoint.headers.items()
    }


def _forget(model: Any) -> None:
    """Drops the notes that binding needed."""
    for key in (PARAMETERS, PREFIX):
        model.metadata_props.pop(key, None)
