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

from surgery.errors import EnvironmentFault, OutputError, quote

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Staging:
    """Context manager around one output folder.

    On entry an empty folder is made beside `target`; `commit` syncs what was written and
    renames it into place; leaving without a commit, for whatever reason, removes it. What a
    killed run left beside the target is removed by the next one. Raises `OutputError` where the
    target exists and is not empty, lies inside one of `sources`, or is being written already.
    """

    def __init__(self, target: Path, sources: tuple[Path, ...] = ()) -> None:
        self.target = target.absolute()
        for source in sources:
            refuse_inside(self.target, source)
        refuse_occupied(self.target)

    def __enter__(self) -> Staging:
        parent = self.target.parent
        self._lock = lock(self.target)
        self._made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._sweep(parent)
            name = tempfile.mkdtemp(prefix=f".{self.target.name}.", suffix=".staging", dir=parent)
        except OSError as error:
            self._remove_parents()
            self._lock.release()
            raise _output_error(parent, error) from None
        self.path = Path(name)
        # mkdtemp makes 0700; the folder shall have what the user's umask gives.
        self.path.chmod(0o777 & ~_umask())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._remove_parents()
        self._lock.release()
        if isinstance(error, OSError):
            raise _fault(self.target, error) from error

    def require(self, needed: int) -> None:
        """Raises `EnvironmentFault` unless `needed` bytes are free where the folder is made."""
        free = shutil.disk_usage(self.path).free
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
                _sync(Path(folder) / name)
        refuse_occupied(self.target)
        try:
            self.path.rename(self.target)
        except OSError as error:
            raise _output_error(self.target, error) from None
        _sync(self.target.parent)

    def _sweep(self, parent: Path) -> None:
        """Removes staged folders of this target: under the lock, they are nobody's any more."""
        head, tail = f".{self.target.name}.", ".staging"
        for path in parent.iterdir():
            random = path.name.removeprefix(head).removesuffix(tail)
            if path.name == f"{head}{random}{tail}" and re.fullmatch(r"[a-z0-9_]{8}", random):
                shutil.rmtree(path, ignore_errors=True)

    def _remove_parents(self) -> None:
        """Removes the folders made above the target, innermost first, as far as they are empty."""
        with suppress(OSError):
            for folder in self._made:
                folder.rmdir()


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


def _fault(target: Path, error: OSError) -> EnvironmentFault:
    if error.errno not in _FULL:
        reason = f"{error.strerror or error} ({quote(error.filename or target)})"
        return EnvironmentFault(f"{target}: failed: {reason}; nothing was written")
    free = shutil.disk_usage(_existing(target)).free
    return EnvironmentFault(f"{target}: disk full, {free} bytes are free; nothing was written")


def _output_error(path: Path, error: OSError) -> Exception:
    if error.errno in _FULL:
        return EnvironmentFault(f"{path}: disk full; nothing was written")
    return OutputError(f"{path}: cannot be written: {error.strerror}; name another output")


def _existing(path: Path) -> Path:
    """`path` or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
