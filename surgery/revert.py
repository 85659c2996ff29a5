"""Both ways along a delta: the base again from its edited checkpoint, and the other way round.

Nothing is computed; bytes are put back. The checkpoint at hand must be the one the delta names,
and what is written must be the one it leads to, by the SHA-256 of every file: anything else
leaves nothing behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from surgery.addresses import Region
from surgery.checkpoint import Checkpoint, Header, Staging, TensorInfo
from surgery.checkpoint.delta import Delta
from surgery.checkpoint.dtypes import numpy_dtype
from surgery.checkpoint.header import parse_header
from surgery.checkpoint.parallel import Advance, Progress, in_parallel
from surgery.checkpoint.resize import Resize, Side
from surgery.checkpoint.stream import Copied, Patch, copy
from surgery.editor import bands, row_bytes
from surgery.errors import CheckpointError, quote

_OTHER: dict[Side, Side] = {"before": "after", "after": "before"}
"""The side at hand, by the one that is written."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint written from another and a delta.

    `lost` are files of the base in other weight formats that were not carried and so could not
    be given back.
    """

    output: Path
    files: int
    lost: tuple[str, ...]


def revert(
    edited: Path,
    delta: Path,
    output: Path,
    *,
    allow_code: bool = False,
    progress: Progress | None = None,
) -> Restored:
    """Writes to `output` the base that `edited` was made from, every file to the byte.

    Raises `CheckpointError` where `delta` does not belong to `edited`, or where the result is
    not the base it names.
    """
    checkpoint = Checkpoint.open(edited, allow_code=allow_code)
    return _restore(checkpoint, Delta.open(delta), output, "before", progress)


def apply_delta(
    base: Path,
    delta: Path,
    output: Path,
    *,
    allow_code: bool = False,
    progress: Progress | None = None,
) -> Restored:
    """Writes to `output` the edited checkpoint that `delta` was made with, from its base."""
    checkpoint = Checkpoint.open(base, allow_code=allow_code)
    return _restore(checkpoint, Delta.open(delta), output, "after", progress)


def _restore(
    checkpoint: Checkpoint, delta: Delta, output: Path, side: Side, progress: Progress | None
) -> Restored:
    record = delta.record
    was, becomes = record.edited, record.base
    if side == "after":
        was, becomes = becomes, was
    with Staging(output, (checkpoint.root,)) as staging:
        become = [_head(delta, file, old, side)[1] for file, old in checkpoint.headers.items()]
        total = sum(header.file_size for header in become)
        staging.require(total)
        jobs = {
            file: partial(_restore_shard, checkpoint, delta, file, staging.path / file, side)
            for file in checkpoint.headers
        }
        for file, copied in in_parallel(jobs, total, progress).items():
            _check(checkpoint.root, file, copied.source, was)
            _check(output, file, copied.target, becomes)
        changed = dict(_changed_files(delta, side))
        for file in sorted({*becomes} - {*checkpoint.headers} - {*changed}):
            copied = copy(checkpoint.path(file), staging.place(file))
            _check(output, file, copied.target, becomes)
        for file, data in changed.items():
            if data is not None:
                _check(output, file, staging.write(file, data), becomes)
            elif file in becomes:
                raise CheckpointError(f"{delta.path}: lacks {side} of {quote(file)}")
        staging.commit()
    return Restored(output, len(becomes), record.lost if side == "before" else ())


def _changed_files(delta: Delta, side: Side) -> Iterator[tuple[str, bytes | None]]:
    for number, file in enumerate(delta.record.files):
        yield file, delta.file(number, side)


def _check(folder: Path, file: str, digest: str, expected: dict[str, str]) -> None:
    if expected.get(file) != digest:
        raise CheckpointError(
            f"{folder}: {quote(file)} has SHA-256 {digest}, the delta says "
            f"{quote(expected.get(file))}; it belongs to another checkpoint"
        )


def _restore_shard(
    checkpoint: Checkpoint, delta: Delta, file: str, target: Path, side: Side, advance: Advance
) -> Copied:
    old = checkpoint.headers[file]
    head, new = _head(delta, file, old, side)
    own = [info for info in old.tensors.values() if info.name in new.tensors]
    patches = [
        patch
        for info in sorted(own, key=lambda info: info.begin)
        for patch in _patches(delta, info, new.tensors[info.name], side)
    ]
    end = max((info.end for info in own), default=old.data_start)
    appended = [info for name, info in new.tensors.items() if name not in old.tensors]
    return copy(
        checkpoint.path(file),
        target,
        head=head,
        skip=old.data_start if head else 0,
        patches=patches,
        stop=end,
        tail=(data for info in appended for data in _appended(checkpoint, delta, info, side)),
        advance=advance,
    )


def _head(delta: Delta, file: str, old: Header, side: Side) -> tuple[bytes | None, Header]:
    """The new first bytes of a shard, None where they stay, and its new header."""
    if file not in delta.record.headers:
        return None, old
    raw = delta.shard_header(delta.record.headers.index(file), side)
    prefix = len(raw).to_bytes(8, "little") + raw
    # The data of the header to be is what its own offsets say: they must tile it.
    size = len(prefix) + _data_size(raw, file)
    return prefix, parse_header(raw, size, file)


def _data_size(raw: bytes, file: str) -> int:
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        return max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError):
        raise CheckpointError(f"{file}: the delta holds a malformed header") from None


def _patches(delta: Delta, old: TensorInfo, new: TensorInfo, side: Side) -> Iterator[Patch]:
    """One patch for each band that changes of a tensor that is `old` and becomes `new`."""
    resize = delta.resize(old.name)
    before, after = (new, old) if side == "before" else (old, new)
    _check_resize(delta, before.shape, after)
    whole = after if resize and resize.longer == "after" else before
    numbers = _regions_of(delta, old.name)
    for rows in bands(whole) if numbers or resize else ():
        at_hand = _at_hand(resize, rows, side)
        stays = not resize or at_hand.shape == resize.region(side, rows).shape
        if stays and not any(delta.record.regions[n].region.overlaps(rows) for n in numbers):
            continue
        begin = old.begin + (at_hand.start[0] * row_bytes(old) if at_hand.start else 0)
        size = at_hand.size * numpy_dtype(old.dtype).itemsize
        yield Patch(begin, begin + size, partial(_put_back, delta, rows, old, side))


def _at_hand(resize: Resize | None, rows: Region, side: Side) -> Region:
    """Where the band `rows` lies in the tensor that `side` is made from."""
    return resize.region(_OTHER[side], rows) if resize else rows


def _check_resize(delta: Delta, before: tuple[int, ...], after: TensorInfo) -> None:
    resize = delta.resize(after.name)
    if resize and not resize.fits(before, after.shape):
        raise CheckpointError(
            f"{delta.path}: how it says {quote(after.name)} is resized is not what its headers say"
        )


def _regions_of(delta: Delta, tensor: str) -> list[int]:
    return [n for n, region in enumerate(delta.record.regions) if region.tensor == tensor]


def _put_back(delta: Delta, rows: Region, info: TensorInfo, side: Side, raw: bytearray) -> bytes:
    """What becomes of the bytes at hand of the band `rows` of the longer tensor."""
    resize = delta.resize(info.name)
    values = np.frombuffer(bytes(raw), numpy_dtype(info.dtype))
    values = values.reshape(_at_hand(resize, rows, side).shape).copy()
    if resize:
        values = resize.spread(_OTHER[side], rows, values)
    for number in _regions_of(delta, info.name):
        region = delta.record.regions[number].region
        if region.overlaps(rows):
            part = region.intersection(rows)
            values[part.within(rows)] = delta.region(number, side)[part.within(region)]
    return (resize.take(side, rows, values) if resize else values).tobytes()


def _appended(
    checkpoint: Checkpoint, delta: Delta, info: TensorInfo, side: Side
) -> Iterator[bytes]:
    """The bytes of a tensor the checkpoint at hand lacks, edits included."""
    new = next((new for new in delta.added() if new.name == info.name), None)
    resize = delta.resize(info.name)
    if new is None or (resize and resize.longer == "after"):
        raise CheckpointError(f"{delta.path}: does not say what {quote(info.name)} begins as")
    _check_resize(delta, new.shape, info)
    for rows in bands(replace(info, shape=new.shape, end=info.begin + new.nbytes)):
        if new.source is None:
            start = bytes(rows.size * numpy_dtype(info.dtype).itemsize)
        else:
            start = checkpoint.read_rows(new.source, rows).tobytes()
        yield _put_back(delta, rows, info, side, bytearray(start))
