"""Where the bytes of an ONNX tensor lie, checked before anything follows them.

ONNX external data (onnx.proto, `TensorProto.external_data`): `location` relative to the model's
folder, `offset` and `length` as decimal text. onnx.checker and onnxruntime each let some bad
ones pass, so links, ranges and sizes are checked here whatever they say.
"""

from __future__ import annotations

import math
import os
import re
import stat
from pathlib import Path
from typing import Any

from surgery.errors import OnnxError, quote

KEYS = ("location", "offset", "length", "checksum")
_WHOLE = re.compile(r"[0-9]{1,19}")
# Element types narrower than a byte, packed: onnx.proto, TensorProto.DataType.
_PACKED_BITS = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}
_STRING = "STRING"


def check_tensor(tensor: Any, folder: Path, where: str) -> None:
    """Checks one TensorProto: known type, real sizes, and data that is all there.

    Raises `OnnxError` naming the tensor; reads no weight byte.
    """
    where = f"{where}: tensor {quote(tensor.name)}"
    size = tensor_bytes(tensor, where)
    if tensor.data_location == tensor.EXTERNAL:
        if tensor.raw_data:
            raise OnnxError(f"{where}: has both raw and external data")
        _check_range(tensor, folder, size, where)
    elif tensor.external_data:
        raise OnnxError(f"{where}: has external data but says its data is inside the file")
    elif tensor.raw_data and len(tensor.raw_data) != size:
        raise OnnxError(
            f"{where}: its shape needs {size} bytes, the file holds {len(tensor.raw_data)}"
        )


def tensor_bytes(tensor: Any, where: str) -> int:
    """How many bytes a TensorProto's type and shape take; strings count as 0."""
    from onnx import TensorProto, helper

    kinds = {number: kind for kind, number in TensorProto.DataType.items()}
    kind = kinds.get(tensor.data_type, "UNDEFINED")
    if kind == "UNDEFINED":
        raise OnnxError(f"{where}: unknown element type {tensor.data_type}")
    if any(size < 0 for size in tensor.dims):
        raise OnnxError(f"{where}: negative size in its shape {list(tensor.dims)}")
    count = math.prod(tensor.dims)
    if kind == _STRING:
        if tensor.raw_data or tensor.data_location == tensor.EXTERNAL:
            raise OnnxError(f"{where}: strings cannot be raw or external data")
        return 0
    bits = _PACKED_BITS.get(kind)
    if bits is None:
        bits = 8 * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    return int(count * bits + 7) // 8


def location(tensor: Any, where: str) -> tuple[str, int, int | None]:
    """(relative path, offset, length or None) of an external tensor, as text alone allows."""
    entries = [(entry.key, entry.value) for entry in tensor.external_data]
    keys = [key for key, _ in entries]
    unknown = [key for key in keys if key not in KEYS]
    if unknown or len(set(keys)) != len(keys):
        found = quote(unknown[0] if unknown else keys)
        raise OnnxError(f"{where}: external data key {found}; expected {', '.join(KEYS)} once each")
    fields = dict(entries)
    path = fields.get("location", "")
    _check_relative(path, where)
    numbers = [_whole(fields[key], key, where) if key in fields else None for key in KEYS[1:3]]
    return path, numbers[0] or 0, numbers[1]


def _whole(text: str, key: str, where: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise OnnxError(f"{where}: external data {key} {quote(text)}; expected a whole number")
    return int(text)


def _check_relative(path: str, where: str) -> None:
    parts = path.split("/")
    bad = not path or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path
    if bad or re.match(r"[A-Za-z]:", path):
        raise OnnxError(
            f"{where}: external data location {quote(path)}; expected a relative path "
            "inside the model's folder"
        )


def _check_range(tensor: Any, folder: Path, size: int, where: str) -> None:
    path, offset, length = location(tensor, where)
    found = _check_file(folder, path, where)
    if length is not None and length != size:
        raise OnnxError(f"{where}: its shape needs {size} bytes, external data has {length}")
    if offset + size > found:
        raise OnnxError(
            f"{where}: bytes {offset} to {offset + size} of {quote(path)}, "
            f"which has only {found} bytes"
        )


def _check_file(folder: Path, relative: str, where: str) -> int:
    """The size of a plain file below `folder`, reached without any link."""
    path = folder
    facts: os.stat_result | None = None
    try:
        for part in relative.split("/"):
            path = path / part
            facts = path.lstat()
            if stat.S_ISLNK(facts.st_mode):
                raise OnnxError(f"{where}: external data {quote(relative)} goes through a link")
    except OSError as error:
        reason = error.strerror
        raise OnnxError(f"{where}: external data {quote(relative)}: {reason}") from None
    if facts is None or not stat.S_ISREG(facts.st_mode):
        raise OnnxError(f"{where}: external data {quote(relative)} is not a regular file")
    if facts.st_nlink > 1:
        raise OnnxError(
            f"{where}: external data {quote(relative)} is a hard link, which ONNX refuses; copy it"
        )
    return facts.st_size
