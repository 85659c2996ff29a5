"""Reading files of a folder we do not trust: regular files inside it, bounded, never a hang."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, EnvironmentFault, quote

CHUNK = 8 << 20
"""Bytes moved at a time when files are copied or hashed."""

PART = 256 << 10
"""Bytes read and hashed at a time: few enough to stay in a core's own cache in between."""

MAX_JSON_BYTES = 64 << 20
_UNUSABLE = frozenset(
    {errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR}
)
"""What is wrong with the path and not with the machine."""

_MAX_FILES = 10_000
_MAX_DEPTH = 16


def resolve_inside(root: Path, relative: str) -> Path:
    """The real path of `root/relative`, which must be a regular file of that folder.

    Symbolic links are followed only inside `root`, or, for a hub snapshot
    (`models--x/snapshots/<revision>`), into the `blobs` folder beside `snapshots`: that is how
    the hub cache lays files out. Raises `CheckpointError` for links that lead elsewhere or
    loop, and for FIFOs, devices and missing files.
    """
    where = f"{root}: {quote(relative)}"
    try:
        real = (root / relative).resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "symbolic link loop"
        raise CheckpointError(f"{where} cannot be read: {reason}") from None
    if not any(real.is_relative_to(folder) for folder in _homes(root)):
        raise CheckpointError(f"{where} is a link out of the folder, to {quote(real)}")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{where} is not a regular file")
    return real


def _homes(root: Path) -> list[Path]:
    real = root.resolve()
    snapshot = real.parent.name == "snapshots"
    return [real, real.parent.parent / "blobs"] if snapshot else [real]


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """A read-only descriptor of the regular file `path`; never blocks on a FIFO.

    Raises `CheckpointError` where it is missing, forbidden or something else, `EnvironmentFault`
    where the machine fails.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _UNUSABLE:
            where = quote(path, 300)
            raise EnvironmentFault(f"{where} cannot be read: {error.strerror}") from None
        raise CheckpointError(f"{quote(path, 300)} cannot be read: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, begin: int, length: int, file: str) -> bytearray:
    """`length` bytes from `begin`; raises `CheckpointError` if the file ends before that.

    Positioned reads are used, not a memory map: a file truncated underneath a map kills the
    process with SIGBUS.
    """
    data = bytearray(length)
    read_into(descriptor, begin, memoryview(data), file)
    return data


def read_into(descriptor: int, begin: int, view: memoryview, file: str) -> None:
    """Fills `view` from `begin`, as `read_exactly` does, in memory the caller has already."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done : done + CHUNK]], begin + done)
        except OSError as error:
            raise EnvironmentFault(f"{file}: cannot be read: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(f"{file}: truncated at byte {begin + done} while it was read")
        done += count


def read_small(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """The whole of a regular file of at most `limit` bytes; raises `CheckpointError`."""
    with open_regular(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise CheckpointError(f"{path}: {size} bytes, more than the {limit} allowed")
        return bytes(read_exactly(descriptor, 0, size, str(path)))


def parse_json_object(
    raw: bytes, source: str, parse_int: Callable[[str], Any] = int
) -> dict[str, Any]:
    """`raw` as a JSON object without duplicate keys; raises `CheckpointError`."""
    try:
        text = raw.decode("utf-8")
        parsed = json.loads(text, object_pairs_hook=unique_pairs, parse_int=parse_int)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: not valid JSON: {quote(error)}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{source}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A `json` object hook that refuses a key given twice, which the library would overwrite."""
    found = dict(pairs)
    if len(found) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {twice!r}")
    return found


def list_files(root: Path, *, hidden: bool = False) -> list[str]:
    """Every file below `root` as sorted relative POSIX paths; hidden folders only if asked for.

    Raises `CheckpointError` for a folder that cannot be read, and past 10,000 files or 16 levels:
    no model folder is like that, and a folder linked into itself is.
    """

    def refuse(error: OSError) -> None:
        where = quote(error.filename or root)
        raise CheckpointError(f"{root}: folder {where} cannot be read: {error.strerror}")

    found: list[str] = []
    for folder, names, files in os.walk(root, onerror=refuse, followlinks=False):
        here = Path(folder).relative_to(root)
        linked = [name for name in names if (Path(folder) / name).is_symlink()]
        names[:] = [n for n in names if n not in linked and (hidden or n[0] != ".")]
        found += [(here / name).as_posix() for name in [*files, *linked]]
        if len(found) > _MAX_FILES or len(here.parts) > _MAX_DEPTH:
            raise CheckpointError(f"{root}: more than {_MAX_FILES} files or {_MAX_DEPTH} levels")
    return sorted(found)


def sha256_file(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 of a regular file's bytes; `advance` is told of every so many done."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(PART))
    with open_regular(path) as descriptor:
        offset = 0
        while count := os.preadv(descriptor, [buffer], offset):
            digest.update(buffer[:count])
            offset += count
            if advance is not None:
                advance(count)
    return digest.hexdigest()
