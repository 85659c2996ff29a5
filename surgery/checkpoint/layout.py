"""Adding tensors to a safetensors file, and resizing some; all else stays as it is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from surgery.checkpoint.dtypes import BITS
from surgery.checkpoint.folder import INDEX, Checkpoint
from surgery.checkpoint.header import Header, TensorInfo, encode_header, parse_header
from surgery.checkpoint.resize import Resize
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


def _relaid(
    header: Header, file: str, added: Sequence[NewTensor], resized: Mapping[str, Resize]
) -> Header:
    """`header` with `added` after the last tensor and the shapes of those `resized`: entries and
    data keep their order. Raises `EditError` where a name is taken."""
    entries = json.loads(header.raw)
    for tensor in added:
        if tensor.name in entries:
            raise EditError(f"{file}: already has a tensor {quote(tensor.name)}")
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape)}
    stored = sorted(header.tensors.values(), key=lambda info: (info.begin, info.end))
    offset = 0
    for name in [*(info.name for info in stored), *(tensor.name for tensor in added)]:
        entry = entries[name]
        if name in resized:
            entry["shape"] = list(resized[name].shape("after", tuple(entry["shape"])))
        end = offset + math.prod(entry["shape"]) * BITS[entry["dtype"]] // 8
        entry["data_offsets"] = [offset, end]
        offset = end
    raw = encode_header(entries)
    return parse_header(raw, 8 + len(raw) + offset, file)


def new_headers(
    base: Checkpoint, added: Sequence[NewTensor], resized: Mapping[str, Resize]
) -> dict[str, Header]:
    """The headers of every shard once `added` are there and tensors are `resized`; untouched
    shards keep theirs."""
    headers = {}
    for file, header in base.headers.items():
        own = [tensor for tensor in added if tensor.file == file]
        relaid = own or not resized.keys().isdisjoint(header.tensors)
        headers[file] = _relaid(header, file, own, resized) if relaid else header
    return headers


def new_index(
    base: Checkpoint, headers: Mapping[str, Header], added: Sequence[NewTensor]
) -> bytes | None:
    """The index text with the `headers` of shards that have `added`, or None where it stays."""
    changed = [file for file, header in headers.items() if header is not base.headers[file]]
    if not changed or INDEX not in base.weight_files:
        return None
    index = json.loads(base.path(INDEX).read_bytes())
    index["weight_map"] |= {tensor.name: tensor.file for tensor in added}
    index["weight_map"] = dict(sorted(index["weight_map"].items()))
    metadata = index.setdefault("metadata", {})
    before, after = ([own[file] for file in changed] for own in (base.headers, headers))
    for key, count in (("total_size", _bytes), ("total_parameters", _elements)):
        if isinstance(metadata.get(key), int):
            metadata[key] += count(after) - count(before)
    return json.dumps(index, indent=2, sort_keys=False).encode() + b"\n"


def _bytes(headers: Iterable[Header]) -> int:
    return sum(info.nbytes for header in headers for info in header.tensors.values())


def _elements(headers: Iterable[Header]) -> int:
    return sum(math.prod(info.shape) for header in headers for info in header.tensors.values())


def tensors_of(headers: dict[str, Header]) -> dict[str, TensorInfo]:
    """Every tensor of every shard by name."""
    return {name: info for header in headers.values() for name, info in header.tensors.items()}
