"""What this machine has of what surgery needs: versions, CPU, memory, disk, file systems, children.

Only the standard library is imported, so that a package that is missing is a row of its own.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from surgery import process
from surgery.places import cache_home

DISTRIBUTION = "weight-surgery"
FLOORS = {
    "onnx": ("1.21", "older ones follow paths and links out of a model's folder"),
    "torch": ("2.10", "older ones can run code while they load weights only"),
    "transformers": ("5.3", "older ones can run code that a config names"),
    "safetensors": ("0.8", "older ones check less of a header"),
}
"""Versions below which a package is not safe with files that somebody else made."""

MEMORY = 4 << 30
DISK = 5 << 30
CHILD_BYTES = 256 << 20
CHILD_SECONDS = 60.0
FICLONE = 0x40049409
BLOCK = 4096
_REQUIREMENT = re.compile(r"([\w.-]+)\s*>=\s*([\d.]+)\s*$")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""What runtimes use where it is there; without the first they are slow."""


@dataclass(frozen=True)
class Row:
    """One thing looked at. status: `ok`, `warn` (something is slower or not offered) or `fail`
    (surgery cannot be relied on); remedy: the way out, empty where there is nothing to do."""

    name: str
    status: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.status != "fail" for row in self.rows)


def examine() -> Diagnosis:
    """Looks at everything. Raises `OSError` where no temporary folder can be made at all."""
    return Diagnosis((*_python(), *_packages(), *_machine(), *_folders(), _child()))


# ------------------------------------------------------------------------------------ versions


def _python() -> Iterator[Row]:
    found = ".".join(map(str, sys.version_info[:3]))
    wanted = _own_metadata("Requires-Python").removeprefix(">=")
    yield _versioned("python", found, wanted, f"install Python {wanted} or newer")


def _packages() -> Iterator[Row]:
    for text in sorted(_requirements()):
        match = _REQUIREMENT.match(text)
        if match is None:
            yield Row(text, "warn", "a requirement this command cannot read")
            continue
        name, declared = match[1], match[2]
        floor, why = FLOORS.get(name, (declared, ""))
        wanted = max(floor, declared, key=release)
        reason = f" ({why})" if why else ""
        remedy = f"pip install '{name}>={wanted}'{reason}"
        try:
            yield _versioned(name, version(name), wanted, remedy)
        except PackageNotFoundError:
            yield Row(name, "fail", "not installed", remedy)


def _requirements() -> list[str]:
    """What is always needed; without our own metadata, what must not be too old."""
    try:
        declared = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return [f"{name}>={floor}" for name, (floor, _) in FLOORS.items()]
    return [text for text in declared if ";" not in text]


def _own_metadata(field: str) -> str:
    try:
        return str(metadata(DISTRIBUTION)[field])
    except PackageNotFoundError:
        return ">=3.11"


def release(text: str) -> tuple[int, ...]:
    """The numbers a version begins with: `2.13.0+cpu` is (2, 13, 0), and `2.10rc1` (2, 10)."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def _versioned(name: str, found: str, wanted: str, remedy: str) -> Row:
    if release(found) >= release(wanted):
        return Row(name, "ok", found)
    return Row(name, "fail", f"{found}, older than {wanted}", remedy)


# ------------------------------------------------------------------------------------- machine


def _machine() -> Iterator[Row]:
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Row("cores", "ok", f"{cores}" + (f", OMP_NUM_THREADS={threads}" if threads else ""))
    yield _instructions()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield _room(
        "memory", total, MEMORY, "", "models of some hundred million parameters may not fit"
    )


def _instructions() -> Row:
    there = [name for name in FLAGS if name in _cpu_flags()]
    if FLAGS[0] in there:
        return Row("instructions", "ok", ", ".join(there))
    return Row("instructions", "warn", f"no {FLAGS[0]}", "nothing to do: models run, slowly")


def _room(name: str, found: int, wanted: int, where: str, remedy: str) -> Row:
    told = f"{found / 2**30:.1f} GiB{where}"
    return Row(name, "ok", told) if found >= wanted else Row(name, "warn", told, remedy)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split()[2:]}


# ---------------------------------------------------------------------------------- file systems


def _folders() -> Iterator[Row]:
    for name, folder in (("cache", cache_home()), ("temporary", Path(tempfile.gettempdir()))):
        yield from _folder(name, _existing(folder))


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it, in which it would be made."""
    return next(
        place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir()
    )


def _folder(name: str, folder: Path) -> Iterator[Row]:
    other = f"name another folder in {'SURGERY_CACHE' if name == 'cache' else 'TMPDIR'}"
    free = shutil.disk_usage(folder).free
    yield _room(f"{name} folder", free, DISK, f" in {folder}", f"free some space, or {other}")
    try:
        scratch = tempfile.TemporaryDirectory(prefix="surgery-doctor-", dir=folder)
    except OSError as error:
        if name == "temporary":
            raise
        remedy = f"make {folder} writable, or {other}"
        yield Row(f"{name} folder", "warn", f"{folder}: {error.strerror}", remedy)
        return
    with scratch as inside:
        for probe, (needed, remedy, work) in PROBES.items():
            yield _probed(f"{name} folder: {probe}", needed, remedy, work, Path(inside))


def _probed(
    name: str, needed: bool, remedy: str, work: Callable[[Path], None], folder: Path
) -> Row:
    try:
        work(folder)
    except OSError as error:
        reason = errno.errorcode.get(error.errno or 0, "error")
        return Row(name, "fail" if needed else "warn", f"no: {reason}", remedy)
    return Row(name, "ok", "yes")


def _rename(folder: Path) -> None:
    """A file replaces another, and a folder takes the place of an empty one, in one step."""
    (folder / "old").write_bytes(b"old")
    (folder / "new").write_bytes(b"new")
    (folder / "new").replace(folder / "old")
    if (folder / "old").read_bytes() != b"new":
        raise OSError(errno.EIO, "the file that was renamed is not the one found")


def _sync(folder: Path) -> None:
    for path, flags in ((folder / "synced", os.O_WRONLY | os.O_CREAT), (folder, os.O_RDONLY)):
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _direct(folder: Path) -> None:
    descriptor = os.open(folder / "direct", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    try:
        with mmap.mmap(-1, BLOCK) as aligned:
            os.write(descriptor, aligned)
    finally:
        os.close(descriptor)


def _link(folder: Path) -> None:
    (folder / "one").write_bytes(b"1")
    (folder / "two").hardlink_to(folder / "one")


def _reflink(folder: Path) -> None:
    with (folder / "source").open("wb+") as source, (folder / "clone").open("wb") as target:
        source.write(bytes(BLOCK))
        source.flush()
        fcntl.ioctl(target.fileno(), FICLONE, source.fileno())


PROBES: dict[str, tuple[bool, str, Callable[[Path], None]]] = {
    "atomic rename": (True, "use a local file system: a run that is killed could tear", _rename),
    "fsync": (True, "use a local file system: a power cut could tear what was written", _sync),
    "O_DIRECT": (False, "nothing to do: writes go through the page cache", _direct),
    "hard links": (False, "nothing to do, but apply --link will not work there", _link),
    "reflink": (False, "nothing to do: bytes are copied", _reflink),
}
"""By what it finds out: whether surgery needs it, the way out, and what raises `OSError` if not."""


# ---------------------------------------------------------------------------------------- child


def _child() -> Row:
    """Whether a child starts, answers, and cannot take more memory than it was given."""
    remedy = "allow child processes and RLIMIT_DATA: without them no model can be run safely"
    with tempfile.TemporaryDirectory(prefix="surgery-doctor-") as folder:
        limits = process.Limits(CHILD_SECONDS, CHILD_BYTES)
        ending = process.run("surgery.doctor", {"bytes": 4 * CHILD_BYTES}, Path(folder), limits)
    if ending.status == "ok" and ending.result["refused"]:
        return Row("child processes with limits", "ok", "yes")
    said = "memory is not limited" if ending.status == "ok" else f"{ending.status}: {ending.detail}"
    return Row("child processes with limits", "fail", said, remedy)


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """The child's side: asks for more memory than it may have."""
    try:
        bytearray(arguments["bytes"])
    except MemoryError:
        return {"refused": True}
    return {"refused": False}


if __name__ == "__main__":
    sys.exit(process.serve(sys.argv[1], work))
