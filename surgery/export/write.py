"""A bound graph on disk, with what says what it is: `surgery-export.json` and `lineage.json`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from surgery import process
from surgery.arch import identify
from surgery.checkpoint import EXPORT_RECEIPT, Checkpoint, Staging
from surgery.checkpoint.files import sha256_file
from surgery.checkpoint.parallel import Advance, Progress, in_parallel
from surgery.checkpoint.receipt import (
    EXPORT_PREDICATE,
    MalformedReceipt,
    open_receipt,
    seal,
    statement,
    subjects,
)
from surgery.checkpoint.staging import lock, sync
from surgery.errors import OutputError
from surgery.export.bind import unused
from surgery.export.cache import versions
from surgery.export.capture import PARAMETERS, PREFIX, serialized
from surgery.export.datafile import plan_data
from surgery.export.expressions import Expressions, Tensor
from surgery.export.layouts.interface import LINEAGE, MODEL, Request, Stages
from surgery.export.lineage import render, trace
from surgery.export.lineage.unused import NOT_HELD, reason
from surgery.export.onnxfile import check, check_here
from surgery.export.quantize import quantize
from surgery.export.quiet import quiet

DATA = f"{MODEL}.data"
FLOATS = "float32"
"""The folder, inside the staged one, where a model waits to be quantised."""
_HIDDEN = ".surgery-export-"
_PACKAGES = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy")


def write_folder(
    model: Any,
    bound: Expressions,
    request: Request,
    stage: Stages,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Write a bound `onnx_ir.Model` with its own data to the new folder `request.output`.

    Everything is staged beside it, accepted by onnx.checker and onnxruntime there, then renamed:
    the folder appears whole or not at all. No number is read twice, nor any that was written.
    Returns file name to bytes. Raises `OutputError` for an occupied output, `EnvironmentFault` for
    a full disk, `OnnxError` when a check refuses or a number does not fit.
    """
    _forget(model)
    with Staging(request.output, sources=(request.checkpoint.root,)) as staging:
        stage("write")
        digests, source = _write_model(model, bound, request, staging, progress)
        if request.quantize:
            stage("quantize")
            digests = _quantized(staging, request.limits)
        stage("check")
        check(staging.path / MODEL, session=True, full=True, limits=request.limits)
        own = request.quantize is None
        lineage = _lineage(model, bound, request) if own else _traced(staging.path / MODEL, request)
        digests[LINEAGE] = staging.write(LINEAGE, lineage)
        staging.write(EXPORT_RECEIPT, _receipt(digests, request, "portable", source, bound))
        sizes = {name: (staging.path / name).stat().st_size for name in (*digests, EXPORT_RECEIPT)}
        staging.commit()
    return sizes


def _write_model(
    model: Any,
    bound: Expressions,
    request: Request,
    staging: Staging,
    progress: Progress | None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Writes graph and data; returns their digests, and those of the checkpoint's weights, which
    are taken at the same time."""
    folder = FLOATS if request.quantize else "."
    checkpoint = request.checkpoint
    data = plan_data(model, bound, DATA)
    graph = serialized(model)
    # The float model makes room for the smaller one only when that is whole.
    staging.require((data.size + len(graph)) * (2 if request.quantize else 1))
    place = staging.place(f"{folder}/{DATA}")
    sizes = {file: checkpoint.path(file).stat().st_size for file in checkpoint.weight_files}
    jobs: dict[str, Callable[[Advance], str]] = {DATA: partial(data.write, place, checkpoint)}
    jobs |= {file: partial(sha256_file, checkpoint.path(file)) for file in sizes}
    found = in_parallel(jobs, data.size + sum(sizes.values()), progress)
    digests = {MODEL: staging.write(f"{folder}/{MODEL}", graph), DATA: found[DATA]}
    return digests, {file: found[file] for file in sizes}


def _quantized(staging: Staging, limits: process.Limits) -> dict[str, str]:
    """Puts the quantised model in the place of the float one; returns its files' digests."""
    floats = staging.path / FLOATS
    check(floats / MODEL, session=True, full=True, limits=limits)
    quantize(floats / MODEL, staging.path / MODEL, limits)
    shutil.rmtree(floats)
    # onnxruntime makes its data file for its owner's eyes only.
    (staging.path / DATA).chmod((staging.path / MODEL).stat().st_mode)
    return {name: sha256_file(staging.path / name) for name in (MODEL, DATA)}


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
    # Its initializers are the tensors themselves; the rest is done by nodes.
    tensors: Expressions = {
        t: Tensor(t) for expression in bound.values() for t in expression.tensors()
    }
    files = {MODEL: graph, LINEAGE: _lineage(model, tensors, request)}
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


def _lineage(model: Any, made_of: Expressions, request: Request) -> bytes:
    """`lineage.json`: what each initializer is made of, and why tensors that none reads are not."""
    checkpoint = request.checkpoint
    arch = identify(checkpoint)
    outputs = tuple(value.name for value in model.graph.outputs)
    left = {
        name: reason(name, checkpoint, arch, outputs) or NOT_HELD
        for name in unused(checkpoint, made_of)
    }
    return render(MODEL, checkpoint.root.name, made_of, left).encode()


def _traced(model: Path, request: Request) -> bytes:
    """`lineage.json` of a model whose initializers another tool made: as it is found out."""
    found = trace(model, request.checkpoint.root).to_json()
    named = {**found, "onnx": MODEL, "model": request.checkpoint.root.name}
    return (json.dumps(named, indent=1) + "\n").encode()


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
    if request.quantize:
        predicate["quantized"] = request.quantize
    return seal(statement(digests, EXPORT_PREDICATE, predicate))


def _headers(checkpoint: Checkpoint) -> dict[str, Any]:
    """Digest of each shard's header, which says where its tensors lie, and the file's size."""
    return {
        shard: {"header": hashlib.sha256(header.raw).hexdigest(), "bytes": header.file_size}
        for shard, header in checkpoint.headers.items()
    }


def _forget(model: Any) -> None:
    """Drops the notes that binding needed, and what the tensors of initializers say themselves."""
    for key in (PARAMETERS, PREFIX):
        model.metadata_props.pop(key, None)
    for value in model.graph.initializers.values():
        value.shape = value.type = None
        value.metadata_props.clear()
