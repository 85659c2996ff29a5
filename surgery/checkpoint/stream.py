"""Copying a shard while hashing it and replacing bytes on the way: one read, one write.

Where the file system can share blocks (reflink), the copy is a clone and only replaced bytes are
written; the source is still read once, for its digest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.files import PART, open_regular, read_exactly, read_into
from surgery.checkpoint.sink import Bytes, Clone, Target, open_target


@dataclass(frozen=True)
class Patch:
    """Bytes `begin` to `end` of the source become `make(old)`, as long where the head stays."""

    begin: int
    end: int
    make: Callable[[bytearray], bytes]


@dataclass(frozen=True)
class Copied:
    """SHA-256 of the bytes that were read and of those that were written."""

    source: str
    target: str


def copy(
    source: Path,
    target: Path,
    *,
    head: bytes | None = None,
    skip: int = 0,
    patches: Sequence[Patch] = (),
    stop: int | None = None,
    tail: Iterable[bytes] = (),
    known: str | None = None,
    advance: Callable[[int], None] | None = None,
) -> Copied:
    """Copies `source` to the new file `target`, synced.

    `head` replaces the first `skip` bytes, `patches` (in order, apart from each other) replace
    bytes, with a new `head` by more or fewer, what lies from `stop` on is read but not written,
    `tail` is appended; `known` is the SHA-256 of the source where that need not be computed, so
    that a clone of it is not even read; `advance` is told of every so many bytes done.
    Raises `CheckpointError` where the source is cut short while it is read.
    """
    with open_regular(source) as descriptor:
        size = os.fstat(descriptor).st_size
        end = size if stop is None else stop
        whole = head is None and end == size
        with open_target(target, descriptor, whole) as output:
            untouched = whole and not patches
            if untouched and known is not None and isinstance(output, Clone):
                return Copied(known, known)
            copying = _Pass(descriptor, str(source), output, advance)
            if known is not None:
                copying.know(known, untouched)
            if head is not None:
                copying.replace(0, skip, lambda _: head)
            begin = skip
            for patch in patches:
                copying.keep(begin, patch.begin)
                copying.replace(patch.begin, patch.end, patch.make)
                begin = patch.end
            copying.keep(begin, end)
            copying.drop(end, size)
            for extra in tail:
                copying.append(extra)
    return copying.digests()


class _Pass:
    """One pass over a source, from front to back: every byte hashed on its way to the target.

    The two digests are one computation until the streams first differ.
    """

    def __init__(
        self,
        source: int,
        file: str,
        target: Target,
        advance: Callable[[int], None] | None,
    ) -> None:
        self._source, self._file, self._target, self._advance = source, file, target, advance
        self._known: str | None = None
        self._read: Any = hashlib.sha256()
        self._written: Any = None

    def know(self, source: str, untouched: bool) -> None:
        """The digest of the source is given; that of the target too where nothing will change."""
        self._known, self._read = source, None
        self._written = None if untouched else hashlib.sha256()

    def keep(self, begin: int, end: int) -> None:
        """Bytes `begin` to `end` stay; they are read where they will be written from."""
        for part in self._parts(begin, end):
            self._hash(part, part)
            self._target.keep(len(part))
            self._tell(len(part))

    def replace(self, begin: int, end: int, make: Callable[[bytearray], bytes]) -> None:
        """Bytes `begin` to `end` become what `make` makes of them."""
        old = read_exactly(self._source, begin, end - begin, self._file)
        new = make(old)
        self._hash(old, new)
        self._target.put(new)
        self._tell(len(new))

    def drop(self, begin: int, end: int) -> None:
        """Bytes `begin` to `end` are read and not written."""
        for part in self._parts(begin, end):
            self._hash(part, b"")

    def append(self, data: bytes) -> None:
        """`data` follows, which the source has not."""
        self._hash(b"", data)
        self._target.put(data)

    def digests(self) -> Copied:
        """Of all that was read and of all that was written so far."""
        source = self._known or self._read.hexdigest()
        return Copied(source, source if self._written is None else self._written.hexdigest())

    def _parts(self, begin: int, end: int) -> Iterator[memoryview]:
        while begin < end:
            part = self._target.room()[: min(PART, end - begin)]
            read_into(self._source, begin, part, self._file)
            yield part
            begin += len(part)

    def _hash(self, old: Bytes, new: Bytes) -> None:
        if self._read and not self._written and old is not new and old != new:
            self._written = self._read.copy()
        if self._written:
            self._written.update(new)
        if self._read:
            self._read.update(old)

    def _tell(self, count: int) -> None:
        if self._advance is not None:
            self._advance(count)
