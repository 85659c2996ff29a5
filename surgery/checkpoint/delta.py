"""A delta: what it takes to go from a base to its edited checkpoint, and back.

One safetensors file. Its tensors `before.N` and `after.N` are the two contents of edited region
N (of a part that was pruned, `after.N` is what it was when it went), `file.N.before` and
`file.N.after` (U8) those of every file that is no shard and changed, came or went,
`header.N.before` and `header.N.after` those of a shard's header. Where all edits of region N are
low-rank, `factor.N.left` [rows, rank] and `factor.N.right` [rank, columns] (F64) are the change
before rounding: `before.N + left @ right` rounds to `after.N`. What all that belongs to, and the
SHA-256 of every file of both checkpoints, is JSON in `__metadata__`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from surgery.addresses import Region
from surgery.checkpoint.dtypes import BITS, numpy_dtype
from surgery.checkpoint.files import open_regular, read_exactly, sha256_file
from surgery.checkpoint.folder import CONFIG, RECEIPT, Checkpoint
from surgery.checkpoint.header import Header, encode_header, read_header
from surgery.checkpoint.layout import NewTensor
from surgery.checkpoint.resize import Resize, Side
from surgery.checkpoint.sink import write_at
from surgery.checkpoint.staging import lock, sync
from surgery.errors import CheckpointError, OutputError, quote

KEY = "surgery_delta"
SLACK = 4096
"""Spaces kept in the header for digests and the receipt, which are known only at the end."""

Factors = tuple[NDArray[np.float64], NDArray[np.float64]]
"""u [rows, rank] and v [rank, columns]: the change u·v of a matrix, before rounding."""

WORTH_FACTORS = 8
"""Factors are kept where they hold so many times fewer numbers than their matrix."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class RegionRecord(_Strict):
    """Region N of the delta."""

    tensor: str
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def region(self) -> Region:
        return Region(self.tensor, self.start, self.stop)


class AddedRecord(_Strict):
    """A tensor the edited checkpoint has and the base has not: zeros, or a copy of `source`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    source: str | None


class ResizeRecord(_Strict):
    """How a tensor's shape changes; what is pruned of it are regions too."""

    tensor: str
    axis: NonNegativeInt
    size: NonNegativeInt
    kept: tuple[tuple[NonNegativeInt, NonNegativeInt], ...]
    longer: Side


class DeltaRecord(_Strict):
    """What the tensors of a delta belong to.

    `base` and `edited` give the SHA-256 of every file of each; `files` and `headers` name what
    `file.N` and `header.N` are; `lost` are files of the base in other weight formats, which a
    delta does not carry.
    """

    schema_version: Literal[1] = 1
    base: dict[str, str]
    edited: dict[str, str]
    regions: tuple[RegionRecord, ...]
    added: tuple[AddedRecord, ...]
    resized: tuple[ResizeRecord, ...] = ()
    files: tuple[str, ...]
    headers: tuple[str, ...]
    lost: tuple[str, ...]


class DeltaWriter:
    """Writes a delta while its checkpoint is written; bands of a region may come in any order.

    `regions` are the edited ones with their stored dtype. `finish` completes the file, `commit`
    puts it in place; without that nothing is left of it, unless it is `owed` to an output that is
    in place already: then the finished file waits for `resume`.
    """

    def __init__(self, path: Path, regions: Sequence[tuple[Region, str]]) -> None:
        if path.exists() or path.is_symlink() or not path.absolute().parent.is_dir():
            raise OutputError(f"{path}: must name a new file in a folder that exists")
        self.owed = False
        self._path, self._staged = path, _staged(path)
        self._entries: dict[str, Any] = {}
        self._regions = regions
        self._numbers: dict[str, list[int]] = {}
        for number, (region, _) in enumerate(regions):
            self._numbers.setdefault(region.tensor, []).append(number)
        self._size = 0
        # With a second region in its tensor, one region's factors would not be its whole change.
        self._factors = {
            region: _Factors(region, alone=len(self._numbers[region.tensor]) == 1)
            for region, _ in regions
        }
        for number, (region, dtype) in enumerate(regions):
            for side in ("before", "after"):
                self._place(f"{side}.{number}", dtype, region.shape)
        self._data_start = 8 + len(self._header(None)) + SLACK + 256 * len(regions)

    def __enter__(self) -> DeltaWriter:
        self._lock = lock(self._path)
        try:
            self._file = os.open(self._staged, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        self._discard()

    def _discard(self) -> None:
        if not self.owed:
            self._staged.unlink(missing_ok=True)
        self._lock.release()

    def add(self, rows: Region, old: NDArray[Any], new: NDArray[Any]) -> None:
        """Keeps what the regions have of a band `rows`; safe from several threads."""
        for number in self._numbers.get(rows.tensor, ()):
            region, _ = self._regions[number]
            if region.overlaps(rows):
                part = region.intersection(rows)
                for side, values in (("before", old), ("after", new)):
                    self._put(f"{side}.{number}", region, part, values[part.within(rows)])

    def observe(self, region: Region, part: Region, factors: Factors | None) -> None:
        """Keeps the low-rank factors of the change of `part` of a region, where there are any."""
        self._factors[region].add(part, factors)

    def finish(
        self,
        record: DeltaRecord,
        files: Mapping[str, tuple[bytes | None, bytes | None]],
        headers: Mapping[str, tuple[bytes, bytes]],
    ) -> None:
        """Writes everything but the regions and syncs the file."""
        self._append_factors()
        self._append("file", [files[name] for name in record.files])
        self._append("header", [headers[name] for name in record.headers])
        raw = self._header(record)
        room = self._data_start - 8
        if len(raw) > room:
            self._move_data(len(raw) - room)
        raw = raw.ljust(self._data_start - 8)
        os.pwrite(self._file, len(raw).to_bytes(8, "little") + raw, 0)
        os.ftruncate(self._file, self._data_start + self._size)
        os.fsync(self._file)

    def commit(self) -> None:
        """Gives the finished file its name."""
        self._staged.rename(self._path)
        sync(self._path.absolute().parent)
        self.owed = False

    def _place(self, name: str, dtype: str, shape: tuple[int, ...]) -> int:
        begin, self._size = self._size, self._size + math.prod(shape) * BITS[dtype] // 8
        self._entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [begin, self._size],
        }
        return begin

    def _put(self, name: str, region: Region, part: Region, values: NDArray[Any]) -> None:
        width = math.prod(region.shape[1:]) * values.dtype.itemsize
        row = part.start[0] - region.start[0] if region.shape else 0
        begin = int(self._entries[name]["data_offsets"][0])
        write_at(self._file, self._data_start + begin + row * width, values.tobytes())

    def _append_factors(self) -> None:
        for number, (region, _) in enumerate(self._regions):
            joined = self._factors[region].joined()
            for side, values in zip(("left", "right"), joined or (), strict=False):
                begin = self._place(f"factor.{number}.{side}", "F64", values.shape)
                write_at(self._file, self._data_start + begin, values.tobytes())

    def _append(self, noun: str, pairs: Sequence[tuple[bytes | None, bytes | None]]) -> None:
        for number, pair in enumerate(pairs):
            for side, data in zip(("before", "after"), pair, strict=True):
                if data is not None:
                    begin = self._place(f"{noun}.{number}.{side}", "U8", (len(data),))
                    write_at(self._file, self._data_start + begin, data)

    def _header(self, record: DeltaRecord | None) -> bytes:
        text = record.model_dump_json() if record else ""
        return encode_header({"__metadata__": {KEY: text}, **self._entries})

    def _move_data(self, by: int) -> None:
        """Makes room for a header that grew past its slack; only many file names get there."""
        by += -by % 8
        data = read_exactly(self._file, self._data_start, self._size, str(self._staged))
        self._data_start += by
        write_at(self._file, self._data_start, data)


def resume(path: Path, edited: Path, base: Checkpoint) -> bool:
    """Ends a run that was stopped when its output `edited` had its name and its delta had not.

    True if there was such a run on `base`: the delta of the receipt in `edited` is at `path` now.
    """
    staged, receipt = _staged(path), edited / RECEIPT
    if path.exists() or not staged.exists() or not receipt.is_file():
        return False
    with lock(path):
        try:
            record = Delta.open(staged).record
        except CheckpointError:
            return False
        expected = [(receipt, record.edited.get(RECEIPT))]
        expected += [(base.path(f), record.base.get(f)) for f in (CONFIG, *base.weight_files)]
        if any(sha256_file(file) != digest for file, digest in expected):
            return False
        staged.rename(path)
        sync(path.absolute().parent)
    return True


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.staging")


class _Factors:
    """The factors of one region, from those of every edit of every band of it."""

    def __init__(self, region: Region, alone: bool) -> None:
        self._matrix = alone and len(region.shape) == 2
        self._size = region.size
        self._left: dict[int, list[NDArray[np.float64]]] = {}
        self._right: dict[int, list[NDArray[np.float64]]] = {}

    def add(self, part: Region, factors: Factors | None) -> None:
        """The edits of a band come in order, the bands in any."""
        if not self._matrix or factors is None:
            self._matrix = False
            return
        self._left.setdefault(part.start[0], []).append(factors[0])
        self._right.setdefault(part.start[0], []).append(factors[1])
        if factors[1].size * WORTH_FACTORS > self._size:
            self._matrix = False

    def joined(self) -> Factors | None:
        """None where an edit of the region has no factors, or has them too large to be of use."""
        if not self._matrix or not self._left:
            return None
        left = np.vstack([np.hstack(self._left[row]) for row in sorted(self._left)])
        right = np.vstack(next(iter(self._right.values())))
        return (left, right) if (left.size + right.size) * WORTH_FACTORS <= self._size else None


@dataclass(frozen=True)
class Delta:
    """An opened delta; contents are read when asked for."""

    path: Path
    header: Header
    record: DeltaRecord

    @classmethod
    def open(cls, path: Path) -> Delta:
        """Opens and checks the delta at `path`; raises `CheckpointError` for anything else."""
        with open_regular(path) as descriptor:
            header = read_header(descriptor, str(path))
        try:
            record = DeltaRecord.model_validate_json(header.metadata.get(KEY, ""))
        except ValidationError:
            raise CheckpointError(f"{path}: is not a delta that surgery wrote") from None
        delta = cls(path, header, record)
        delta._check()
        return delta

    def region(self, number: int, side: Side) -> NDArray[Any]:
        """The contents of region `number`, in its stored dtype and shape."""
        info = self.header.tensors[f"{side}.{number}"]
        raw = np.frombuffer(self._bytes(info.name), numpy_dtype(info.dtype))
        return raw.reshape(info.shape)

    def factors(self, number: int) -> Factors | None:
        """The low-rank factors of region `number`, where it has them."""
        names = [f"factor.{number}.{side}" for side in ("left", "right")]
        if any(name not in self.header.tensors for name in names):
            return None
        infos = [self.header.tensors[name] for name in names]
        left, right = (np.frombuffer(self._bytes(i.name), "<f8").reshape(i.shape) for i in infos)
        return left, right

    def file(self, number: int, side: Side) -> bytes | None:
        """The contents of file `number`; None where that checkpoint has no such file."""
        name = f"file.{number}.{side}"
        return bytes(self._bytes(name)) if name in self.header.tensors else None

    def shard_header(self, number: int, side: Side) -> bytes:
        """The JSON bytes of shard header `number`."""
        return bytes(self._bytes(f"header.{number}.{side}"))

    def added(self) -> Iterator[NewTensor]:
        for record in self.record.added:
            yield NewTensor(record.name, record.dtype, record.shape, record.file, record.source)

    def resize(self, tensor: str) -> Resize | None:
        """How the shape of a tensor changes; None where it stays."""
        found = (record for record in self.record.resized if record.tensor == tensor)
        return next((Resize(r.axis, r.size, r.kept, r.longer) for r in found), None)

    def _bytes(self, name: str) -> bytearray:
        info = self.header.tensors[name]
        with open_regular(self.path) as descriptor:
            return read_exactly(descriptor, info.begin, info.nbytes, str(self.path))

    def _check(self) -> None:
        """Every tensor that the record speaks of is there, in its region's shape."""
        for number, region in enumerate(self.record.regions):
            for side in ("before", "after"):
                info = self.header.tensors.get(f"{side}.{number}")
                if info is None or info.shape != region.region.shape:
                    raise CheckpointError(f"{self.path}: lacks {side} of {quote(region.tensor)}")
        for number, file in enumerate(self.record.headers):
            for side in ("before", "after"):
                if f"header.{number}.{side}" not in self.header.tensors:
                    raise CheckpointError(f"{self.path}: lacks the header of {quote(file)}")
