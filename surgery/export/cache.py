"""Captured graphs under the user's cache folder: a graph follows from the config, not the weights.

An entry is one file: a line of JSON that says what it is, with the SHA-256 of the rest, then the
graph as an ONNX protobuf. It is named after everything it follows from, written beside its place
and renamed into it; a damaged entry is none.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.receipt import canonical
from surgery.places import cache_home

SUFFIX = ".graph"


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed version of each package."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def folder() -> Path:
    """Where entries lie: below `SURGERY_CACHE`, else `XDG_CACHE_HOME`, else `~/.cache`."""
    return cache_home() / "graphs"


def load(key: str) -> bytes | None:
    """The graph of an entry; None where there is none, or it is damaged."""
    try:
        raw = (folder() / f"{key}{SUFFIX}").read_bytes()
    except OSError:
        return None
    head, _, graph = raw.partition(b"\n")
    said = _said(head)
    return graph if said and said["sha256"] == hashlib.sha256(graph).hexdigest() else None


def store(key: str, facts: Mapping[str, Any], graph: bytes) -> None:
    """Writes an entry, whoever else writes it too; a folder that cannot be written is left be."""
    head = canonical({**facts, "sha256": hashlib.sha256(graph).hexdigest()})
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder()) as scratch:
            written = Path(scratch) / key
            written.write_bytes(head + b"\n" + graph)
            written.replace(folder() / f"{key}{SUFFIX}")
    except OSError:
        return


@dataclass(frozen=True)
class Entry:
    """One cached graph: its file, its size in bytes and what it says of itself."""

    path: Path
    size: int
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "bytes": self.size, **self.facts}


def entries() -> list[Entry]:
    """Every entry, the newest first."""
    return sorted(_entries(), key=lambda entry: entry.path.stat().st_mtime, reverse=True)


def clear() -> int:
    """Removes every entry, and what a killed writer left; returns how many bytes that were."""
    files = [path for path in folder().rglob("*") if path.is_file()] if folder().is_dir() else []
    size = sum(path.stat().st_size for path in files)
    shutil.rmtree(folder(), ignore_errors=True)
    return size


def _entries() -> Iterator[Entry]:
    for path in folder().glob(f"*{SUFFIX}") if folder().is_dir() else ():
        with path.open("rb") as file:
            said = _said(file.readline(4096).rstrip(b"\n"))
        if said:
            facts = {name: value for name, value in said.items() if name != "sha256"}
            yield Entry(path, path.stat().st_size, facts)


def _said(head: bytes) -> dict[str, Any] | None:
    try:
        said = json.loads(head)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) and isinstance(said.get("sha256"), str) else None
