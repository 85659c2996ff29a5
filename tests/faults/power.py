"""What a power cut leaves, from the `strace -f -y` of a run.

The model: a file's data is sure to be on the disk if it was written before an fsync of that file
began and the fsync has ended; a name in a folder (made, moved there or removed) if the folder was
synced likewise. What is not sure may be there or not. A product is safe if at every moment from
its first appearance all of it is sure, and its name is before the run ends: then a cut at any
moment leaves no product or a whole one, and after the run a whole one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CALLS = (
    "open,openat,creat,write,writev,pwrite64,pwritev,pwritev2,ftruncate,truncate,fallocate,"
    "copy_file_range,sendfile,ioctl,fsync,fdatasync,rename,renameat,renameat2,link,linkat,"
    "mkdir,mkdirat,rmdir,unlink,unlinkat,symlink,symlinkat"
)
_LINE = re.compile(r"(\d+) +(.*)")
_UNFINISHED = " <unfinished ...>"
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)")
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+|\?)(?:<(.*?)>)?")
_FD = re.compile(r"\d+<([^>]*)>")
_AT = re.compile(r'(?:AT_FDCWD|\d+)<([^>]*)>, "([^"]*)"')
_PATH = re.compile(r'"([^"]*)"')


@dataclass(frozen=True)
class Event:
    """A call that succeeded, and the lines of the trace on which it began and ended."""

    name: str
    paths: tuple[str, ...]
    arguments: str
    began: int
    ended: int


def record(command: Sequence[object], trace: Path) -> int:
    """Runs `surgery` with these arguments under strace; its exit code."""
    argv = ["strace", "-f", "-y", "-qq", "-s", "0", "-e", "signal=none", "-e", f"trace={CALLS}",
            "-o", trace, sys.executable, "-m", "surgery", *command]  # fmt: skip
    quiet = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(list(map(str, argv)), env=quiet, capture_output=True, check=False)
    return done.returncode


def events(trace: str) -> Iterator[Event]:
    """The successful calls of a trace, in the order in which they ended."""
    begun: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(trace.splitlines()):
        process, text = _LINE.fullmatch(line).groups()  # type: ignore[union-attr]
        if text.endswith(_UNFINISHED):
            begun[process] = number, text.removesuffix(_UNFINISHED)
            continue
        start = number
        if resumed := _RESUMED.fullmatch(text):
            start, head = begun.pop(process)
            text = head + resumed[1]
        match = _CALL.match(text)
        if match and not match[3].startswith("-"):
            paths = _paths(match[1], match[2], match[4])
            yield Event(match[1], paths, match[2], start, number)


def _paths(name: str, arguments: str, result: str | None) -> tuple[str, ...]:
    """The files a call is about, absolute."""
    if name in ("open", "openat", "creat"):
        return (result or "",)
    if name.endswith("at") or name == "renameat2":
        return tuple(os.path.join(*pair) for pair in _AT.findall(arguments))  # noqa: PTH118
    if match := _FD.match(arguments):
        return (match[1],)
    return tuple(path if path[:1] == "/" else "" for path in _PATH.findall(arguments))


@dataclass
class _Node:
    """Lines on which a file or folder got its name, was last changed (a folder: its entries),
    and began to be synced."""

    named: int = -1
    changed: int = -1
    sure: int = -1


@dataclass
class Disk:
    """What is there and what of it is sure, as the calls of a run go by."""

    nodes: dict[str, _Node] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Lets one call happen."""
        name, paths, now = event.name, event.paths, event.ended
        if name in ("fsync", "fdatasync"):
            self._node(paths[0]).sure = event.began
        elif name in ("open", "openat", "creat"):
            if name == "creat" or "O_CREAT" in event.arguments:
                self._make(paths[0], now)
            if name == "creat" or "O_TRUNC" in event.arguments:
                self._node(paths[0]).changed = now
        elif name.startswith(("mkdir", "link", "symlink")):
            self._make(paths[-1], now)
        elif name.startswith("rename"):
            self._move(paths[0], paths[1], now)
        elif name.startswith(("unlink", "rmdir")):
            self.nodes.pop(paths[0], None)
            self._node(_parent(paths[0])).changed = now
        elif name != "ioctl" or "FICLONE" in event.arguments:
            self._node(paths[0]).changed = now

    def below(self, product: str) -> dict[str, _Node]:
        """The files and folders of `product`, itself included."""
        inside = f"{product}/"
        found = self.nodes.items()
        return {path: node for path, node in found if path == product or path.startswith(inside)}

    def name_is_sure(self, path: str) -> bool:
        return self._node(_parent(path)).sure >= self._node(path).named

    def _node(self, path: str) -> _Node:
        return self.nodes.setdefault(path, _Node())

    def _make(self, path: str, now: int) -> None:
        """A new name, unless it was there before."""
        if path not in self.nodes:
            self.nodes[path] = _Node(now, now)
            self._node(_parent(path)).changed = now

    def _move(self, source: str, target: str, now: int) -> None:
        for path in self.below(source):
            self.nodes[target + path[len(source) :]] = self.nodes.pop(path)
        self._node(target).named = now
        self._node(_parent(source)).changed = self._node(_parent(target)).changed = now


def losses(happened: Iterable[Event], products: Sequence[Path]) -> list[str]:
    """What a power cut could spoil or take away, each in one line; empty if nothing."""
    found: dict[str, None] = {}
    disk, made = Disk(), [str(product) for product in products]
    for event in happened:
        disk.take(event)
        for product in made:
            for path, node in disk.below(product).items():
                if node.sure < node.changed:
                    found[f"{product} is there before {path} is synced"] = None
    for product in products:
        if str(product) not in disk.nodes:
            found[f"{product} was never made"] = None
        for path in map(str, (product, *product.parents)):
            if not disk.name_is_sure(path):
                found[f"the run ends before the name of {path} is synced"] = None
    return list(found)


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"
