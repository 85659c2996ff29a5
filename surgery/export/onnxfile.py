"""Reading an ONNX file somebody else wrote, and refusing it before a runtime opens it.

`read` is what any child process of ours does first; `check` is for the parent: it runs `read`,
onnx.checker and, on request, an onnxruntime session in a child with limits. A file passes only
when nobody refuses it. No weight byte of external data is read.
"""

from __future__ import annotations

import contextlib
import stat
import tempfile
from pathlib import Path
from typing import Any

from surgery import process
from surgery.errors import OnnxError, quote
from surgery.export.external import location
from surgery.export.onnxgraph import Scope, check_function, check_graph, check_opsets

MAX_PROTO_BYTES = 2**31 - 1
"""What protobuf can hold; larger models keep their weights in external data."""

CHECK_LIMITS = process.Limits(seconds=300.0)


def read(path: Path, initializers: Path | None = None) -> Any:
    """The checked ModelProto of `path`, its external data left on disk.

    External data is looked for in `initializers`, else in the file's own folder. Raises
    `OnnxError`, one line that names the file and the tensor, node or field.
    """
    model = _parse(path)
    if model.ir_version < 1 or not model.opset_import or not model.graph.output:
        raise OnnxError(f"{path}: is not an ONNX model: no IR version, operator set or output")
    if model.training_info:
        raise OnnxError(f"{path}: holds training graphs; expected an inference model")
    opsets = check_opsets(model, str(path))
    functions = frozenset((function.domain, function.name) for function in model.functions)
    scope = Scope(opsets, functions, initializers or path.parent, str(path))
    for function in model.functions:
        check_function(function, scope)
    check_graph(model.graph, scope)
    return model


def external_files(path: Path, initializers: Path | None = None) -> list[str]:
    """Relative paths of the files that hold the initializers of the model at `path`."""
    tensors = read(path, initializers).graph.initializer
    external = (tensor for tensor in tensors if tensor.data_location == tensor.EXTERNAL)
    return sorted({location(tensor, str(path))[0] for tensor in external})


def _parse(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    data = _bytes(path)
    try:
        return onnx.load_model_from_string(data)
    except DecodeError as error:
        raise OnnxError(f"{path}: is not an ONNX file: {quote(error)}") from None


def _bytes(path: Path) -> bytes:
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise OnnxError(f"{path}: is not a regular file; expected an .onnx file")
        if not 0 < facts.st_size <= MAX_PROTO_BYTES:
            raise OnnxError(
                f"{path}: {facts.st_size} bytes; expected 1 to {MAX_PROTO_BYTES}: "
                "save larger models with external data"
            )
        return path.read_bytes()
    except OSError as error:
        raise OnnxError(f"{path}: cannot be read: {error.strerror}") from None


def check(
    path: Path,
    *,
    initializers: Path | None = None,
    session: bool = False,
    full: bool = False,
    limits: process.Limits = CHECK_LIMITS,
) -> None:
    """Raises `OnnxError` unless `read`, onnx.checker and (with `session`) onnxruntime accept it.

    With `full` the checker also infers types and shapes, and refuses any that contradict each
    other; it knows none of operators outside of ONNX's own domains.
    All of it runs in a child: a checker that crashes or hangs has refused the file.
    """
    folder = initializers.resolve() if initializers else None
    arguments = {
        "action": "check",
        "path": str(path.absolute()),
        "initializers": str(folder) if folder else None,
        "session": session,
        "full": full,
    }
    with tempfile.TemporaryDirectory(prefix="surgery-check-") as scratch:
        ending = process.run("surgery.export.worker", arguments, Path(scratch), limits)
    ending.value(f"{path}: was refused", OnnxError)


def check_here(path: Path, initializers: Path | None, session: bool, *, full: bool = False) -> None:
    """`check`'s work, in the calling process."""
    model = read(path, initializers)
    _run_checker(path, initializers, model, full)
    if session:
        import onnxruntime

        onnxruntime.set_default_logger_severity(4)
        # Opening, not optimising: what is asked is whether the file can be loaded.
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        _open_session(path, initializers, options)


def _run_checker(path: Path, initializers: Path | None, model: Any, full: bool) -> None:
    from onnx import checker, shape_inference

    try:
        if initializers is None:
            checker.check_model(str(path), full_check=full)
        else:
            # Given a proto, the checker looks for external data in the working folder.
            with contextlib.chdir(initializers):
                checker.check_model(model, full_check=full)
    except (
        checker.ValidationError,
        shape_inference.InferenceError,
        ValueError,
        RuntimeError,
    ) as error:
        line = (str(error).strip().splitlines() or ["no message"])[0]
        raise OnnxError(f"{path}: onnx.checker: {quote(line, 300)}") from None


def _open_session(path: Path, initializers: Path | None, options: Any) -> None:
    import onnxruntime

    source: str | bytes = str(path)
    if initializers is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(initializers))
        source = path.read_bytes()
    try:
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exception classes share no base but this
        line = (str(error).strip().splitlines() or ["no message"])[0]
        raise OnnxError(f"{path}: onnxruntime: {quote(line, 300)}") from None
