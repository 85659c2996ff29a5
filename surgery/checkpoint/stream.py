"""Copying a shard while hashing it and replacing bytes on the way: one read, one write.

Where the file system can share blocks (reflink), the copy is a clone and only replaced bytes are
written; the source is still read once, for its digest.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.files import CHUNK, open_regular, read_exactly

FICLONE = 0x40049409
"""ioctl_ficlone(2)."""


@dataclass(frozen=True)
class Patch:
    """Bytes `begin` to `end` of the source become `make(old)`, which is as long."""

    begin: int
    end: int
    make: Callable[[bytearray], bytes]


@dataclass(frozen=True)
class Copied:
    """SHA-256 of the bytes that were read and of those that were written."""

    source: str
    target: str


class _Twin:
    """Two digests that are one computation until the streams first differ."""

    def __init__(self) -> None:
        self._source: Any = hashlib.sha256()
        self._target: Any = None

    def update(self, old: bytes | bytearray, new: bytes | bytearray) -> None:
        if self._target is None and old != new:
            self._target = self._source.copy()
        if self._target is not None:
            self._target.update(new)
        self._source.update(old)

    def digests(self) -> Copied:
        target = self._source if self._target is None else self._target
        return Copied(self._source.hexdigest(), target.hexdigest())


def copy(
    source: Path,
    target: Path,
    *,
    head: bytes | None = None,
    skip: int = 0,
    patches: Sequence[Patch] = (),
    tail: Iterable[bytes] = (),
    advance: Callable[[int], None] | None = None,
) -> Copied:
    """Copies `source` to the new file `target`.

    `head` replaces the first `skip` bytes, `patches` (in order, apart from each other) replace
    bytes of the same length, `tail` is appended; `advance` is told of every so many bytes done.
    Raises `CheckpointError` where the source is cut short while it is read.
    """
    twin = _Twin()
    with open_regular(source) as old, target.open("xb", buffering=0) as output:
        new = output.fileno()
        cloned = head is None and _clone(old, new)
        if head is not None:
            twin.update(read_exactly(old, 0, skip, str(source)), head)
            _write(new, 0, head)
        shift = 0 if head is None else len(head) - skip
        size = os.fstat(old).st_size
        for begin, before, after in _pieces(old, skip, size, patches, str(source)):
            twin.update(before, after)
            if not cloned or before is not after:
                _write(new, begin + shift, after)
            if advance is not None:
                advance(len(after))
        end = size + shift
        for extra in tail:
            twin.update(b"", extra)
            _write(new, end, extra)
            end += len(extra)
    return twin.digests()


def _pieces(
    descriptor: int, begin: int, size: int, patches: Sequence[Patch], file: str
) -> Iterator[tuple[int, bytearray, bytes | bytearray]]:
    """(offset, old bytes, new bytes) over the whole source; the same object where unpatched."""
    for patch in patches:
        yield from _plain(descriptor, begin, patch.begin, file)
        old = read_exactly(descriptor, patch.begin, patch.end - patch.begin, file)
        yield patch.begin, old, patch.make(old)
        begin = patch.end
    yield from _plain(descriptor, begin, size, file)


def _plain(
    descriptor: int, begin: int, end: int, file: str
) -> Iterator[tuple[int, bytearray, bytearray]]:
    for offset in range(begin, end, CHUNK):
        data = read_exactly(descriptor, offset, min(CHUNK, end - offset), file)
        yield offset, data, data


def _clone(source: int, target: int) -> bool:
    """Shares all blocks of `source` with `target`; False where the file system cannot."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError:
        return False
    return True


def _write(descriptor: int, offset: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
