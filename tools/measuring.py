"""Measuring a child process from outside: seconds, peak memory, what it reads of weight files.

Nothing heavy is imported here or by what imports this: a child's peak memory, as the kernel keeps
it, starts at that of the process it was forked from.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CHUNK = 8 << 20
SAMPLE_SECONDS = 0.02


class Failed(Exception):
    """A command that was to be measured did not do its work."""


@dataclass(frozen=True)
class Run:
    """`peak` is in bytes, the greatest of any one process; `peaks` that of each, by its command
    line, where asked for."""

    seconds: float
    peak: int
    peaks: dict[str, int] = field(default_factory=dict)


def run(
    command: Sequence[str],
    *,
    sample: bool = False,
    each: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Run:
    """Runs a command to its end; raises `Failed` with its words where it fails.

    With `sample`, the peak is of the sum over the command and its descendants; with `each`, of
    every one of them for itself as well.
    """
    with tempfile.TemporaryFile() as words:
        begin = time.perf_counter()
        child = subprocess.Popen(
            command,
            stdout=words,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        sampler = Sampler(child.pid) if sample else None
        peaks = Peaks(child.pid) if each else None
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - begin
        child.returncode = os.waitstatus_to_exitcode(status)
        summed = sampler.stop() if sampler else 0
        found = peaks.stop() if peaks else {}
        if child.returncode:
            words.seek(0)
            said = words.read().decode(errors="replace")[-2000:]
            raise Failed(f"{' '.join(command)}: exit {child.returncode}: {said}")
    return Run(seconds, max(usage.ru_maxrss << 10, summed), found)


class Sampler:
    """The greatest sum of resident memory over a process and its descendants."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak = pid, 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._loop)
        self.thread.start()

    def stop(self) -> int:
        self.ended.set()
        self.thread.join()
        return self.peak

    def _loop(self) -> None:
        while not self.ended.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, sum(map(resident, tree(self.pid))))


def tree(pid: int) -> list[int]:
    """`pid` and its descendants; a process that is gone has none."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [pid, *(below for text in lists for child in text.split() for below in tree(int(child)))]


def resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


class Peaks:
    """The greatest resident memory of each process below `pid`, by its command line, in bytes."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.found: dict[str, int] = {}
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._loop)
        self.thread.start()

    def stop(self) -> dict[str, int]:
        self.ended.set()
        self.thread.join()
        return self.found

    def _loop(self) -> None:
        while not self.ended.wait(SAMPLE_SECONDS):
            for pid in tree(self.pid):
                if (peak := high_water_mark(pid)) and (command := command_line(pid)):
                    self.found[command] = max(self.found.get(command, 0), peak)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def high_water_mark(pid: int) -> int:
    """The most memory a process has had resident, in bytes; 0 for one that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def warm(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(CHUNK):
            pass


def cool(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


_CALL = re.compile(r"^(\w+)\(.*?(\d+)<([^>]*\.safetensors)>.*\)\s+= (\d+|0x[0-9a-f]+)")
_OFFSET = {
    "pread64": re.compile(r", (\d+)\)\s+= "),
    "preadv": re.compile(r", (\d+)\)\s+= "),
    "preadv2": re.compile(r", (\d+), \w+\)\s+= "),
}
"""Where a positioned read has its offset: last, or before the flags."""
CALLS = (
    "open,openat,close,read,readv,lseek,pread64,preadv,preadv2,mmap,sendfile,copy_file_range,splice"
)


def weight_bytes_read(command: list[str], folder: Path) -> tuple[int, int]:
    """Bytes a command reads past the headers of weight files, and how often it maps one."""
    with tempfile.TemporaryDirectory(dir=folder) as traces:
        # One trace per thread: lines of threads that interleave are cut in two.
        strace = ["strace", "-ff", "-y", "-s", "0", "-e", f"trace={CALLS}", "-o", f"{traces}/t"]
        run([*strace, *command])
        counts = [count_reads(trace.read_text()) for trace in Path(traces).iterdir()]
    opened = sum(count[2] for count in counts)
    if not opened:
        raise Failed("strace saw no weight file opened: the trace proves nothing")
    return sum(count[0] for count in counts), sum(count[1] for count in counts)


def count_reads(trace: str) -> tuple[int, int, int]:
    """(bytes read past the header, files mapped, calls seen) of one thread's trace.

    A read without an offset goes on where the last one of its descriptor ended; what another
    thread may have moved, or a call not known here reads, counts as weight.
    """
    past = mapped = seen = 0
    positions: dict[str, int] = {}
    for line in trace.splitlines():
        if (call := _CALL.match(line)) is None:
            continue
        name, descriptor, path, result = call.groups()
        seen += 1
        start = header_end(Path(path))
        if name == "mmap":
            mapped += 1
        elif name in _OFFSET and (offset := _OFFSET[name].search(line)):
            past += _past(int(offset[1]), int(result), start)
        elif name in ("read", "readv"):
            begin = positions.get(descriptor, 0)
            positions[descriptor] = begin + int(result)
            past += _past(begin, int(result), start)
        elif name == "lseek":
            positions[descriptor] = int(result)
        elif name == "close":
            positions.pop(descriptor, None)
        elif name not in ("open", "openat"):
            past += int(result)
    return past, mapped, seen


def _past(begin: int, count: int, start: int) -> int:
    """How many of `count` bytes from `begin` lie at or after `start`."""
    return max(begin + count - max(begin, start), 0)


def header_end(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
