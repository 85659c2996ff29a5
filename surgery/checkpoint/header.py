"""The safetensors header, read strictly and without touching a weight byte.

Layout (safetensors README, "Format"): u64 little-endian header length N, N bytes of JSON that
start with `{`, then the data; each entry is `{"dtype", "shape", "data_offsets": [begin, end]}`
with offsets relative to the data start, and the ranges tile the data exactly. What the reference
reader lets pass (duplicate keys, aliased ranges) is refused here: an edit must know that a byte
belongs to one tensor.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint.dtypes import BITS
from surgery.checkpoint.files import parse_json_object
from surgery.errors import CheckpointError, quote

MAX_HEADER_BYTES = 100_000_000
"""The reference implementation's own bound."""

_MAX_ELEMENTS = 2**63 - 1
_MAX_AXES = 64
_PREFIX = 8
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of one file: `begin` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    file: str

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A parsed header: `raw` is the exact JSON bytes, `data_start` where the data begins."""

    raw: bytes
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    @property
    def data_start(self) -> int:
        return _PREFIX + len(self.raw)

    @property
    def file_size(self) -> int:
        """Bytes of the file: prefix, header and data."""
        return self.data_start + sum(info.nbytes for info in self.tensors.values())


def read_header(descriptor: int, file: str) -> Header:
    """The header of the open file `descriptor`, which messages call `file`.

    Raises `CheckpointError` on anything but a well-formed file whose ranges tile it exactly.
    """
    size = os.fstat(descriptor).st_size
    length = _header_length(os.pread(descriptor, _PREFIX, 0), size, file)
    raw = os.pread(descriptor, length, _PREFIX)
    if len(raw) != length:
        raise CheckpointError(f"{file}: truncated while reading its header")
    return parse_header(raw, size, file)


def parse_header(raw: bytes, file_size: int, file: str) -> Header:
    """`raw` JSON bytes of a file of `file_size` bytes, checked whole; raises `CheckpointError`."""
    entries = _parse_json(raw, file)
    metadata = _metadata(entries.pop("__metadata__", {}), file)
    data_start = _PREFIX + len(raw)
    tensors = {
        name: _tensor(name, entry, data_start, file_size, file) for name, entry in entries.items()
    }
    _check_tiling(tensors, data_start, file_size, file)
    return Header(raw, tensors, metadata)


def encode_header(entries: dict[str, Any]) -> bytes:
    """`entries` as header JSON, padded with spaces so that the data starts on 8 bytes."""
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)


def _header_length(prefix: bytes, size: int, file: str) -> int:
    if len(prefix) < _PREFIX:
        raise CheckpointError(f"{file}: {size} bytes is too short for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file}: header length {length} is outside 2 to {MAX_HEADER_BYTES}; not safetensors?"
        )
    if _PREFIX + length > size:
        raise CheckpointError(f"{file}: header of {length} bytes does not fit in {size} bytes")
    return length


def _parse_json(raw: bytes, file: str) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{file}: the header must start with '{{', found {quote(raw[:8])}")
    return parse_json_object(raw, f"{file}: header", parse_int=_integer)


def _integer(text: str) -> int | float:
    # -0 is a float to the reference reader; Python would make it the natural number 0.
    return -0.0 if text == "-0" else int(text)


def _metadata(metadata: Any, file: str) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ must map strings to strings")
    for text in [*metadata, *metadata.values()]:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise CheckpointError(f"{file}: __metadata__ holds a lone surrogate: {quote(text)}")
    return metadata


def _tensor(name: str, entry: Any, data_start: int, size: int, file: str) -> TensorInfo:
    where = f"{file}: tensor {quote(name)}"
    if not name or not name.isprintable():
        raise CheckpointError(f"{where}: the name is empty or holds unprintable characters")
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise CheckpointError(f"{where}: expected exactly the fields {sorted(_FIELDS)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{where}: unknown dtype {quote(dtype)}; known: {', '.join(BITS)}")
    if not _naturals(shape):
        raise CheckpointError(f"{where}: shape must be a list of integers from 0: {quote(shape)}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{where}: data_offsets must be two integers from 0: {quote(offsets)}"
        )
    begin, end = (data_start + offset for offset in offsets)
    _check_extent(where, dtype, shape, end - begin)
    if end > size:
        raise CheckpointError(f"{where}: its data ends at byte {end}, the file at {size}")
    return TensorInfo(name, dtype, tuple(shape), begin, end, file)


def _naturals(value: Any) -> bool:
    # bool is an int in Python, and JSON's true is no dimension; 64 axes are what numpy allows.
    return (
        isinstance(value, list)
        and len(value) <= _MAX_AXES
        and all(type(item) is int and 0 <= item <= _MAX_ELEMENTS for item in value)
    )


def _check_extent(where: str, dtype: str, shape: list[int], nbytes: int) -> None:
    elements = math.prod(shape)
    bits = elements * BITS[dtype]
    # A zero among the sizes must not hide an overflow among the others.
    if math.prod(filter(None, shape)) * BITS[dtype] > 8 * _MAX_ELEMENTS or bits % 8:
        raise CheckpointError(f"{where}: {elements} elements of {dtype} are not a whole size")
    if bits // 8 != nbytes:
        raise CheckpointError(
            f"{where}: {dtype} of shape {shape} takes {bits // 8} bytes, data_offsets give {nbytes}"
        )


def _check_tiling(tensors: dict[str, TensorInfo], start: int, size: int, file: str) -> None:
    position = start
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end)):
        if info.begin != position:
            kind = "a hole" if info.begin > position else "an overlap"
            raise CheckpointError(
                f"{file}: tensor {quote(info.name)} leaves {kind} at byte {position}, "
                f"it begins at {info.begin}"
            )
        position = info.end
    if position != size:
        raise CheckpointError(f"{file}: {size - position} bytes follow the last tensor")
