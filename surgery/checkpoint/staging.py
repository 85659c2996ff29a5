"""A folder that appears whole or not at all: written beside its target, synced, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from surgery.errors import EnvironmentFault, OutputError, SurgeryError, quote

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_REFUSED = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.ENOTEMPTY,
        errno.EPERM,
        errno.EROFS,
    }
)
"""What is wrong with the place and not with the machine."""


class Staging:
    """Context manager around one output folder.

    On entry an empty folder is made beside `target`; `commit` syncs what was written and
    renames it into place, of which `committed` tells; leaving without a commit, for whatever
    reason, removes it. What a killed run left beside the target is removed by the next one. Raises
    `OutputError` where the target exists and is not empty, lies inside one of `sources`, or is
    being written already.
    """

    def __init__(self, target: Path, sources: tuple[Path, ...] = ()) -> None:
        self.target = target.absolute()
        self.committed = False
        self._needed = 0
        for source in sources:
            refuse_inside(self.target, source)
        refuse_occupied(self.target)

    def __enter__(self) -> Staging:
        parent = self.target.parent
        self._lock = lock(self.target)
        self._made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._sweep()
            name = tempfile.mkdtemp(prefix=f".{self.target.name}.", suffix=".staging", dir=parent)
            self.path = Path(name)
            # mkdtemp makes 0700; the folder shall have what the user's umask gives.
            self.path.chmod(0o777 & ~_umask())
        except OSError as error:
            fault = self._fault(error, parent)
            self._discard()
            raise fault from None
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What the disk had is asked before its space is given back.
        fault = self._fault(error, self.target) if isinstance(error, OSError) else None
        self._discard()
        if fault is not None:
            raise fault from error

    def require(self, needed: int) -> None:
        """Raises `EnvironmentFault` unless `needed` bytes are free where the folder is made."""
        self._needed, free = needed, shutil.disk_usage(self.path).free
        if needed > free:
            raise EnvironmentFault(
                f"{self.target}: needs {needed} bytes, {free} are free; nothing was written"
            )

    def place(self, relative: str) -> Path:
        """Where file `relative` is to be written, its folder made."""
        path = self.path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, relative: str, data: bytes) -> str:
        """Writes a small file; returns its SHA-256."""
        self.place(relative).write_bytes(data)
        return hashlib.sha256(data).hexdigest()

    def commit(self) -> None:
        """Syncs every file and folder and renames the staged folder to its target."""
        for folder, _, files in os.walk(self.path):
            for name in [*files, "."]:
                sync(Path(folder) / name)
        refuse_occupied(self.target)
        try:
            self.path.rename(self.target)
        finally:
            self.committed = not self.path.exists()
        for made in (self.target, *self._made):
            sync(made.parent)

    def _discard(self) -> None:
        """Removes what was made and not committed, and lets go of the lock."""
        with suppress(OSError):
            self._sweep()
        self._remove_parents()
        self._lock.release()

    def _sweep(self) -> None:
        """Removes staged folders of this target: under the lock, they are nobody's any more."""
        head, tail = f".{self.target.name}.", ".staging"
        for path in self.target.parent.iterdir():
            random = path.name.removeprefix(head).removesuffix(tail)
            if path.name == f"{head}{random}{tail}" and re.fullmatch(r"[a-z0-9_]{8}", random):
                shutil.rmtree(path, ignore_errors=True)

    def _remove_parents(self) -> None:
        """Removes the folders made above the target, innermost first, as far as they are empty."""
        with suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def _fault(self, error: OSError, place: Path) -> SurgeryError:
        """What an error of the system means for the user."""
        reason = f"{error.strerror or error} ({quote(error.filename or place)})"
        if self.committed:
            return EnvironmentFault(
                f"{self.target}: is whole and in its place, but was not synced to the last: "
                f"{reason}; it may be lost if the machine stops now"
            )
        if error.errno in _REFUSED:
            return OutputError(f"{place}: cannot be written: {error.strerror}; name another output")
        if error.errno in _FULL:
            reason = _space(_existing(self.target), self._needed)
        return EnvironmentFault(f"{self.target}: failed: {reason}; nothing was written")


def lock(target: Path) -> FileLock:
    """The lock on writing `target`, acquired; a run that is killed gives it back.

    It lies in the temporary folder, not beside the target: nothing is left there. Raises
    `OutputError` where another run holds it.
    """
    folder = Path(tempfile.gettempdir()) / f"surgery-locks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    name = hashlib.sha256(os.fsencode(os.path.realpath(target))).hexdigest()
    held = FileLock(folder / f"{name}.lock")
    try:
        held.acquire(blocking=False)
    except Timeout:
        raise OutputError(f"{target}: another run is writing it; name another output") from None
    return held


def refuse_inside(target: Path, source: Path) -> None:
    """Raises `OutputError` where `target` is `source` or lies inside it."""
    real = source.resolve()
    if target.resolve().is_relative_to(real):
        raise OutputError(f"{target}: lies in {source}, which is only read; name another folder")


def refuse_occupied(target: Path) -> None:
    """Raises `OutputError` where `target` exists, unless it is an empty folder."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputError(f"{target}: exists and is not a folder; name another output")
    if target.is_dir() and any(target.iterdir()):
        raise OutputError(f"{target}: exists and is not empty; name another output")


def _space(folder: Path, needed: int) -> str:
    """What a full disk lacks: bytes or, with bytes left, inodes."""
    found = os.statvfs(folder)
    if found.f_files and not found.f_favail:
        return "disk full: no inodes are left for more files"
    free = found.f_bavail * found.f_frsize
    wanted = f"{needed} bytes are needed, " if needed else ""
    return f"disk full: {wanted}{free} were free when it failed"


def _existing(path: Path) -> Path:
    """`path` or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Syncs a file or a folder: its contents, or the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
