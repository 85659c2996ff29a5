"""The checkpoint's own numbers as a captured graph's initializers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint import Checkpoint
from surgery.errors import ExportError, OnnxError, quote
from surgery.export.capture import ALIASES
from surgery.export.names import find_tensor

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
}
_FLOATS = ("F64", "F32", "F16", "BF16")


def bind(model: Any, checkpoint_dir: Path, dtype: str = "float32") -> dict[str, str]:
    """Make every parameter initializer of `model` read its tensor from the checkpoint.

    Tensors are read and cast to `dtype` one at a time, when the file is written. Initializers
    that are no parameters (rotary frequencies, position tables) keep their captured values.
    Returns initializer name to tensor name. Raises `ExportError` when a parameter has no tensor
    or one of another shape, or when tensors the model ties differ on disk; `OnnxError` when a
    finite value does not fit float16.
    """
    checkpoint = Checkpoint.open(checkpoint_dir)
    aliases: dict[str, tuple[str, ...]] = model.meta[ALIASES]
    bound = {}
    for name, value in model.graph.initializers.items():
        if name in aliases:
            tensor = _source(checkpoint, name, aliases[name])
            _check(checkpoint, tensor, value, dtype)
            value.const_value = _lazy(checkpoint, tensor, value)
            bound[name] = tensor
    return bound


def _source(checkpoint: Checkpoint, name: str, aliases: tuple[str, ...]) -> str:
    """The tensor of a parameter, by its own name or one that the model ties to it."""
    near = [find_tensor(alias, checkpoint.tensors) for alias in (name, *aliases)]
    found = list(dict.fromkeys(tensor for tensor in near if tensor is not None))
    if not found:
        raise ExportError(f"{checkpoint.root}: has no tensor for parameter {quote(name)}")
    first = checkpoint.read_bytes(found[0]) if len(found) > 1 else b""
    for other in found[1:]:
        if checkpoint.read_bytes(other) != first:
            raise ExportError(
                f"{checkpoint.root}: the config ties {quote(found[0])} and {quote(other)}, but "
                "they differ; set tie_word_embeddings to false"
            )
    return found[0]


def _check(checkpoint: Checkpoint, tensor: str, value: Any, dtype: str) -> None:
    info = checkpoint.info(tensor)
    shape = tuple(value.shape.numpy())
    if info.shape != shape or info.dtype not in _FLOATS:
        raise ExportError(
            f"{checkpoint.root}: tensor {quote(tensor)} is {info.dtype} {list(info.shape)}; "
            f"the graph expects a float tensor {list(shape)}"
        )
    if value.dtype.numpy() != DTYPES[dtype]:
        raise ExportError(f"initializer {quote(value.name)} is {value.dtype}; expected {dtype}")
    if dtype == "float16":
        _refuse_overflow(checkpoint, tensor)


def _refuse_overflow(checkpoint: Checkpoint, tensor: str) -> None:
    source = checkpoint.read(tensor)
    lost = np.isfinite(source) & ~np.isfinite(cast(source, DTYPES["float16"]))
    if lost.any():
        worst = float(np.abs(source[lost].astype(np.float64)).max())
        raise OnnxError(
            f"{checkpoint.root}: tensor {quote(tensor)} holds {worst:g}, which does not fit "
            "float16 (largest 65504); export with --dtype float32"
        )


def _lazy(checkpoint: Checkpoint, tensor: str, value: Any) -> Any:
    import onnx_ir

    dtype = value.dtype.numpy()

    def read() -> Any:
        return onnx_ir.tensor(cast(checkpoint.read(tensor), dtype), name=value.name)

    make: Callable[..., Any] = onnx_ir.LazyTensor
    return make(read, dtype=value.dtype, shape=value.shape, name=value.name)


def cast(source: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """`source` in `dtype`, rounded once to nearest-even; overflow gives infinities, in silence."""
    if source.dtype == ml_dtypes.bfloat16 and dtype == np.float16:
        source = source.astype(np.float32)  # exact; ml_dtypes' own cast is not numpy's
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(source.astype(dtype, copy=False))
