"""Where a copied shard goes: a file written from front to back, or a clone that is patched.

A `Sink` writes past the page cache (open(2), O_DIRECT) where the file system lets it: a shard is
written once and then synced, so a detour through the cache would cost a second copy of every
byte, and would push out of it what the machine does need. Two aligned buffers take turns, one
being filled and hashed while the other is on its way to the disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from mmap import mmap
from pathlib import Path
from types import TracebackType

FICLONE = 0x40049409
"""ioctl_ficlone(2)."""

BUFFER = 2 << 20
"""Bytes of one buffer: a few times what the disk wants at once, and small enough for the caches."""

_ALIGNMENT = 4096
"""What O_DIRECT may ask of address, offset and length on any file system of today."""

Bytes = bytes | bytearray | memoryview


class Target(ABC):
    """A new, open file that takes bytes in order; leaving it syncs it, or on an error closes it."""

    def __init__(self, file: int) -> None:
        self._file = file

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._finish()
            if error is None:
                os.fsync(self._file)
        finally:
            os.close(self._file)

    @abstractmethod
    def room(self) -> memoryview:
        """Memory to read the next unchanged bytes into."""

    @abstractmethod
    def keep(self, count: int) -> None:
        """The next bytes are the first `count` of `room()`, as in the source."""

    @abstractmethod
    def put(self, data: Bytes) -> None:
        """The next bytes are `data`, which the source has not."""

    @abstractmethod
    def _finish(self) -> None:
        """Hands over what is still held back."""


class Sink(Target):
    """Writes every byte."""

    def __init__(self, file: int) -> None:
        super().__init__(file)
        self._direct = _bypass_cache(self._file, True)
        self._buffers = [memoryview(mmap(-1, BUFFER)) for _ in range(2)]
        self._filled, self._offset = 0, 0
        self._writer = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def room(self) -> memoryview:
        return self._buffers[0][self._filled :]

    def keep(self, count: int) -> None:
        self._filled += count
        if self._filled == BUFFER:
            self._flush()

    def put(self, data: Bytes) -> None:
        view = memoryview(data)
        while view:
            room = self.room()
            count = min(len(room), len(view))
            room[:count] = view[:count]
            view = view[count:]
            self.keep(count)

    def _flush(self) -> None:
        """Sends the buffer off and goes on with the other, once that one has been written."""
        self._wait()
        part = self._buffers[0][: self._filled]
        self._pending = self._writer.submit(self._write, part, self._offset)
        self._offset, self._filled = self._offset + self._filled, 0
        self._buffers.reverse()

    def _write(self, part: memoryview, offset: int) -> None:
        if self._direct and len(part) % _ALIGNMENT:
            self._direct = not _bypass_cache(self._file, False)
        try:
            write_at(self._file, offset, part)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
            # The file system took the flag and not the write.
            self._direct = not _bypass_cache(self._file, False)
            write_at(self._file, offset, part)

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _finish(self) -> None:
        try:
            if self._filled:
                self._flush()
            self._wait()
        finally:
            self._writer.shutdown()


class Clone(Target):
    """Shares its blocks with the source already and writes only what differs from it."""

    def __init__(self, file: int) -> None:
        super().__init__(file)
        self._offset, self._scratch = 0, memoryview(bytearray(BUFFER))

    def room(self) -> memoryview:
        return self._scratch

    def keep(self, count: int) -> None:
        self._offset += count

    def put(self, data: Bytes) -> None:
        write_at(self._file, self._offset, data)
        self._offset += len(data)

    def _finish(self) -> None:
        """Nothing is held back."""


def open_target(path: Path, source: int, whole: bool) -> Target:
    """The new file `path`: a clone of `source`, where the `whole` of it stays and the file system
    can share its blocks."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    return Clone(file) if whole and _clone(source, file) else Sink(file)


def _clone(source: int, target: int) -> bool:
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


def _bypass_cache(descriptor: int, on: bool) -> bool:
    """Sets or clears O_DIRECT; whether that was possible."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | (os.O_DIRECT if on else 0))
    except OSError:
        return False
    return True
