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

from surgery.checkpoint.files import CHUNK, open_regular, read_exactly, read_into

FICLONE = 0x40049409
"""ioctl_ficlone(2)."""


Bytes = bytes | bytearray | memoryview


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

    def update(self, old: Bytes, new: Bytes) -> None:
        if self._target is None and old is not new and old != new:
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
    stop: int | None = None,
    tail: Iterable[bytes] = (),
    advance: Callable[[int], None] | None = None,
) -> Copied:
    """Copies `source` to the new file `target`.

    `head` replaces the first `skip` bytes, `patches` (in order, apart from each other) replace
    bytes of the same length, what lies from `stop` on is read but not written, `tail` is
    appended; `advance` is told of every so many bytes done.
    Raises `CheckpointError` where the source is cut short while it is read.
    """
    twin = _Twin()
    with open_regular(source) as old, target.open("xb", buffering=0) as output:
        new, size = output.fileno(), os.fstat(old).st_size
        end = size if stop is None else stop
        cloned = head is None and end == size and _clone(old, new)
        if head is not None:
            twin.update(read_exactly(old, 0, skip, str(source)), head)
            write_at(new, 0, head)
        shift = 0 if head is None else len(head) - skip
        for begin, before, after in _pieces(old, skip, end, patches, str(source)):
            twin.update(before, after)
            if not cloned or before is not after:
                write_at(new, begin + shift, after)
            if advance is not None:
                advance(len(after))
        for _, left, _ in _pieces(old, end, size, (), str(source)):
            twin.update(left, b"")
        place = end + shift
        for extra in tail:
            twin.update(b"", extra)
            write_at(new, place, extra)
            place += len(extra)
    return twin.digests()


def _pieces(
    descriptor: int, begin: int, size: int, patches: Sequence[Patch], file: str
) -> Iterator[tuple[int, Bytes, Bytes]]:
    """(offset, old bytes, new bytes) over the whole source; the same object where unpatched.

    Unpatched bytes come in one buffer that is used again and again: they are gone with the next
    piece, and no fresh memory is touched for them.
    """
    buffer = memoryview(bytearray(min(CHUNK, size)))
    for patch in patches:
        yield from _plain(descriptor, begin, patch.begin, buffer, file)
        old = read_exactly(descriptor, patch.begin, patch.end - patch.begin, file)
        yield patch.begin, old, patch.make(old)
        begin = patch.end
    yield from _plain(descriptor, begin, size, buffer, file)


def _plain(
    descriptor: int, begin: int, end: int, buffer: memoryview, file: str
) -> Iterator[tuple[int, memoryview, memoryview]]:
    for offset in range(begin, end, CHUNK):
        part = buffer[: min(CHUNK, end - offset)]
        read_into(descriptor, offset, part, file)
        yield offset, part, part


def _clone(source: int, target: int) -> bool:
    """Shares all blocks of `source` with `target`; False where the file system cannot."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError:
        return False
    return True


def write_at(descriptor: int, offset: int, data: Bytes) -> None:
    """Writes all of `data` at `offset`."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
