"""Adding tensors to a safetensors file, and leaving parts of some out; all else stays as it is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Region, runs
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


@dataclass(frozen=True)
class Cut:
    """What is left of a tensor: along `axis`, the indices in the ranges `kept`, in order."""

    axis: int
    kept: tuple[tuple[int, int], ...]

    @classmethod
    def without(cls, axis: int, size: int, dropped: Iterable[int]) -> Cut:
        """An axis of length `size` loses the indices `dropped`."""
        return cls(axis, tuple(runs(set(range(size)) - set(dropped))))

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is left of a tensor of `shape`."""
        return self.left(Region.whole("", shape)).stop

    def fits(self, shape: tuple[int, ...], left: tuple[int, ...]) -> bool:
        """Whether the ranges are in order and leave `left` of a tensor of `shape`."""
        edges = [edge for run in self.kept for edge in run]
        ordered = all(a <= b for a, b in pairwise([0, *edges]))
        within = self.axis < len(shape) and all(edge <= shape[self.axis] for edge in edges)
        return ordered and within and self.shape(shape) == left

    def left(self, rows: Region) -> Region:
        """Where that which is left of the band `rows` lies in the tensor that is left."""
        start, stop = list(rows.start), list(rows.stop)
        start[self.axis] = self._count(start[self.axis])
        stop[self.axis] = self._count(stop[self.axis])
        return Region(rows.tensor, tuple(start), tuple(stop))

    def dropped(self, tensor: str, shape: tuple[int, ...]) -> tuple[Region, ...]:
        """What goes of `tensor`, whose shape was `shape`."""
        kept = {index for run in self.kept for index in range(*run)}
        gone = runs(set(range(shape[self.axis])) - kept)
        return tuple(Region.band(tensor, shape, self.axis, *run) for run in gone)

    def take(self, rows: Region, values: NDArray[Any]) -> NDArray[Any]:
        """What is left of the numbers of the band `rows`."""
        return np.compress(self._mask(rows), values, self.axis)

    def spread(self, rows: Region, left: NDArray[Any]) -> NDArray[Any]:
        """The band `rows` with what is `left` of it in place, and zeros where the rest was."""
        values = np.zeros(rows.shape, left.dtype)
        values[(slice(None),) * self.axis + (self._mask(rows),)] = left
        return values

    def _mask(self, rows: Region) -> NDArray[np.bool_]:
        mask = np.zeros(rows.shape[self.axis], bool)
        first = rows.start[self.axis]
        for start, stop in self.kept:
            mask[max(start - first, 0) : max(stop - first, 0)] = True
        return mask

    def _count(self, index: int) -> int:
        """How many kept indices lie below `index`."""
        return sum(min(max(index - start, 0), stop - start) for start, stop in self.kept)


def _relaid(
    header: Header, file: str, added: Sequence[NewTensor], cuts: Mapping[str, Cut]
) -> Header:
    """`header` with `added` after the last tensor and the shapes that `cuts` leave: entries and
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
        if name in cuts:
            entry["shape"] = list(cuts[name].shape(tuple(entry["shape"])))
        end = offset + math.prod(entry["shape"]) * BITS[entry["dtype"]] // 8
        entry["data_offsets"] = [offset, end]
        offset = end
    raw = encode_header(entries)
    return parse_header(raw, 8 + len(raw) + offset, file)


def new_headers(
    base: Checkpoint, added: Sequence[NewTensor], cuts: Mapping[str, Cut]
) -> dict[str, Header]:
    """The headers of every shard once `added` are there and `cuts` are made; untouched shards
    keep theirs."""
    headers = {}
    for file, header in base.headers.items():
        own = [tensor for tensor in added if tensor.file == file]
        relaid = own or not cuts.keys().isdisjoint(header.tensors)
        headers[file] = _relaid(header, file, own, cuts) if relaid else header
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
