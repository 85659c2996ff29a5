"""What long work has found so far, kept on disk so that it can go on where it stopped."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Journal:
    """A folder of pieces, each a `.npz` file by the digest of its name; the folder stands for one
    model, one set of prompts and one set of options, and is made when the first piece is kept."""

    folder: Path

    def arrays(self, name: str, compute: Callable[[], Arrays]) -> dict[str, NDArray[Any]]:
        """The piece called `name`: what was kept of it, else what `compute` gives, now kept."""
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"
        kept = _read(path)
        if kept is None:
            kept = dict(compute())
            self._write(path, kept)
        return kept

    def array(self, name: str, compute: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """A piece of one array."""
        return self.arrays(name, lambda: {"value": compute()})["value"]

    def close(self) -> None:
        """Removes the folder: the work is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, path: Path, arrays: Arrays) -> None:
        # Renamed when whole: a piece that is there can be trusted.
        self.folder.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}.half")
        with half.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        half.replace(path)


def _read(path: Path) -> dict[str, NDArray[Any]] | None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        return None
