"""What a report says of the files a run read: where they are, and their digests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.files import sha256_file
from surgery.differential import Pair
from surgery.evidence import EDGES
from surgery.export import onnxfile
from surgery.record import environment


@dataclass(frozen=True)
class Read:
    """Files a run reads besides its models, and the folder relative to which those inside are
    named, for a run's own folder is about to be renamed."""

    stimuli: tuple[Path, ...]
    root: Path | None

    def described(self, pairs: Mapping[str, Pair]) -> dict[str, dict[str, Any]]:
        """Every corner's model and every file of stimuli by name."""
        root = self.root
        return {
            **{EDGES[edge][0]: _weights(pair.model, root) for edge, pair in pairs.items()},
            **{EDGES[edge][1]: _onnx(pair, root) for edge, pair in pairs.items()},
            **{f"stimuli {number}": _file(path, root) for number, path in enumerate(self.stimuli)},
        }


def _weights(folder: Path, root: Path | None) -> dict[str, Any]:
    checkpoint = Checkpoint.open(folder)
    files = ("config.json", *checkpoint.weight_files)
    digests = {file: sha256_file(checkpoint.path(file)) for file in files}
    return {"path": _shown(folder, root), "sha256": digests}


def _onnx(pair: Pair, root: Path | None) -> dict[str, Any]:
    """The graph's file and every file its weights lie in."""
    names = onnxfile.external_files(pair.onnx, pair.initializers)
    files = {pair.onnx.name: pair.onnx} | {name: pair.data / name for name in names}
    digests = {name: sha256_file(file) for name, file in files.items()}
    return {"path": _shown(pair.onnx, root), "sha256": digests}


def _file(path: Path, root: Path | None) -> dict[str, Any]:
    return {"path": _shown(path, root), "sha256": sha256_file(path)}


def _shown(path: Path, root: Path | None) -> str:
    inside = root is not None and path.is_relative_to(root)
    return str(path.relative_to(root)) if root is not None and inside else str(path)


def versions() -> dict[str, str]:
    """The environment, and the versions of what the corners ran in."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "onnx", "onnxruntime")
    return {**environment(), **{name: version(name) for name in packages}}
