"""Adding tensors to a safetensors file without touching the data that is there."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from surgery.checkpoint.dtypes import BITS
from surgery.checkpoint.folder import INDEX, Checkpoint
from surgery.checkpoint.header import Header, TensorInfo, encode_header, parse_header
from surgery.errors import EditError, quote


@dataclass(frozen=True)
class NewTensor:
    """A tensor to append to shard `file`: zeros, or with `source` the bytes of that tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    source: str | None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


def extend_header(header: Header, file: str, added: Sequence[NewTensor]) -> Header:
    """`header` with `added` after the last tensor: old entries, their order and their offsets
    relative to the data start are kept. Raises `EditError` where a name is taken."""
    entries = json.loads(header.raw)
    offset = sum(info.nbytes for info in header.tensors.values())
    for tensor in added:
        if tensor.name in entries:
            raise EditError(f"{file}: already has a tensor {quote(tensor.name)}")
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = encode_header(entries)
    return parse_header(raw, 8 + len(raw) + offset, file)


def extended_headers(base: Checkpoint, added: Sequence[NewTensor]) -> dict[str, Header]:
    """The headers of every shard once `added` are there; untouched shards keep theirs."""
    return {
        file: extend_header(header, file, [tensor for tensor in added if tensor.file == file])
        if any(tensor.file == file for tensor in added)
        else header
        for file, header in base.headers.items()
    }


def extended_index(base: Checkpoint, added: Sequence[NewTensor]) -> bytes | None:
    """The index text once `added` are there, or None where there is no index to change."""
    if not added or INDEX not in base.weight_files:
        return None
    index = json.loads(base.path(INDEX).read_bytes())
    index["weight_map"] |= {tensor.name: tensor.file for tensor in added}
    index["weight_map"] = dict(sorted(index["weight_map"].items()))
    metadata = index.setdefault("metadata", {})
    for key, amount in (
        ("total_size", sum(tensor.nbytes for tensor in added)),
        ("total_parameters", sum(math.prod(tensor.shape) for tensor in added)),
    ):
        if isinstance(metadata.get(key), int):
            metadata[key] += amount
    return json.dumps(index, indent=2, sort_keys=False).encode() + b"\n"


def tensors_of(headers: dict[str, Header]) -> dict[str, TensorInfo]:
    """Every tensor of every shard by name."""
    return {name: info for header in headers.values() for name, info in header.tensors.items()}
