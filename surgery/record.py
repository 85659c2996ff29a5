"""What the receipt of an edit says: gathered while the edit is written, read by who checks it."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Region
from surgery.checkpoint import RECEIPT, Checkpoint
from surgery.checkpoint.dtypes import bits, compute_dtype
from surgery.checkpoint.files import read_small
from surgery.checkpoint.receipt import EDIT_PREDICATE, MalformedReceipt, open_receipt, subjects
from surgery.checkpoint.resize import Side
from surgery.errors import CheckpointError
from surgery.plan import Plan, Step


class TensorRecord:
    """The receipt's record of one edited tensor, gathered band by band in row order."""

    def __init__(self, plan: Plan, tensor: str) -> None:
        self._plan, self._tensor = plan, tensor
        self._before, self._after = hashlib.sha256(), hashlib.sha256()
        self._squares, self._largest, self._changed, self._nonfinite = 0.0, 0.0, 0, 0

    def add(self, rows: Region, old: NDArray[Any], new: NDArray[Any]) -> bytes:
        """Counts the next band in, `old` as stored and `new`; returns the bytes written of it."""
        before = self._plan.take("before", rows, old).tobytes()
        after = self._plan.take("after", rows, new).tobytes()
        self._before.update(before)
        self._after.update(after)
        self._count(old, new)
        return after

    def _count(self, old: NDArray[Any], new: NDArray[Any]) -> None:
        dtype = compute_dtype(self._plan.tensors[self._tensor].dtype)
        with np.errstate(invalid="ignore", over="ignore"):  # a signalling NaN says so
            before = old.astype(dtype)
            change = new.astype(dtype) - before
            nonfinite = before.size - int(np.count_nonzero(np.isfinite(before)))
            if nonfinite:
                # What was kept did not change, though NaN less NaN is no zero.
                change[bits(old) == bits(new)] = 0
            self._squares += float(np.square(change, dtype=np.float64).sum())
            self._largest = float(np.max(np.abs(change), initial=self._largest))
        self._nonfinite += nonfinite
        self._changed += int(np.count_nonzero(change))

    def to_json(self) -> dict[str, Any]:
        """Norms are text: JSON has no NaN, and a source may hold some."""
        plan, info = self._plan, self._plan.tensors[self._tensor]
        steps = plan.steps_of(self._tensor)
        stored = self._tensor in plan.base.tensors
        return {
            "name": self._tensor,
            "role": str(plan.arch.roles[self._tensor]),
            "dtype": info.dtype,
            "shape": list(info.shape),
            "pruned": _resize_record(plan, self._tensor, "before"),
            "grown": _resize_record(plan, self._tensor, "after"),
            "before_sha256": self._before.hexdigest() if stored else None,
            "after_sha256": self._after.hexdigest(),
            # NaN and infinities of the source are kept to the bit; that they are there is said.
            "source_nonfinite": self._nonfinite,
            "edits": _edit_records(plan, steps),
            "change": {
                "frobenius": repr(float(np.sqrt(self._squares))),
                "max_abs": repr(self._largest),
                "elements": repr(self._changed),
            },
        }


def predicate(
    plan: Plan,
    folder: Path,
    base_digests: Mapping[str, str],
    records: list[dict[str, Any]],
    *,
    trusted: list[str],
    linked: list[str],
) -> dict[str, Any]:
    """The predicate of the receipt of `plan`, written to `folder`.

    `base_digests` are those of the base's files, of which `trusted` were taken from its own
    receipt and not computed; `linked` are shards that are hard links to the base's.
    """
    base = {"name": plan.base.root.resolve().name, "files": dict(base_digests), "trusted": trusted}
    return {
        "base": base,
        "recipe": {"text": plan.recipe.text, "sha256": plan.recipe.sha256},
        "inputs": plan.inputs,
        "tensors": records,
        "added": [tensor.name for tensor in plan.added],
        "config": plan.config,
        "not_carried": list(plan.base.not_carried),
        "parents": list(_parents(plan.base)),
        "linked": linked,
        "stat": {file: _stat(folder / file) for file in plan.headers},
        "environment": environment(),
    }


def trusted_digests(base: Checkpoint) -> dict[str, str]:
    """SHA-256 by shard, from the receipt that lies beside them, of those that are as it left them.

    That is a matter of size, modification time and inode: the bytes are not read. Empty where
    there is no receipt; raises `MalformedReceipt` where it is not as it was sealed.
    """
    if RECEIPT not in base.not_carried:
        return {}
    path = base.root / RECEIPT
    receipt = open_receipt(path, EDIT_PREDICATE)
    digests, noted = subjects(receipt, path), receipt.get("predicate")
    stats = noted.get("stat") if isinstance(noted, dict) else None
    if not isinstance(stats, dict):
        raise MalformedReceipt(f"{path}: does not say what its files were like; do not trust it")
    return {
        file: digests[file]
        for file in base.headers
        if file in digests and stats.get(file) == _stat(base.path(file))
    }


def _stat(path: Path) -> dict[str, str]:
    """As text: JSON numbers of this size do not survive every reader."""
    found = path.stat()
    return {
        "size": str(found.st_size),
        "mtime_ns": str(found.st_mtime_ns),
        "inode": str(found.st_ino),
    }


def _parents(base: Checkpoint) -> Iterator[dict[str, str]]:
    if RECEIPT in base.not_carried:
        raw = read_small(base.path(RECEIPT))
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{base.root / RECEIPT}: is not UTF-8; remove it") from None
        yield {"sha256": hashlib.sha256(raw).hexdigest(), "text": text}


def environment() -> dict[str, str]:
    """Versions and machine facts that a result may depend on."""
    packages = ("weight-surgery", "numpy", "ml_dtypes", "safetensors")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
        "threads": str(os.cpu_count()),
    }


def _resize_record(plan: Plan, tensor: str, longer: Side) -> dict[str, Any] | None:
    """What of the longer one the shorter has, as ranges along one axis, and the new shape."""
    resize = plan.resized.get(tensor)
    if resize is None or resize.longer != longer:
        return None
    return {
        "axis": resize.axis,
        "kept": [list(run) for run in resize.kept],
        "shape": list(plan.shape("after", tensor)),
    }


def _edit_records(plan: Plan, steps: tuple[Step, ...]) -> list[dict[str, Any]]:
    grouped: dict[int, list[Step]] = {}
    for step in steps:
        grouped.setdefault(step.edit, []).append(step)
    return [
        {
            "edit": index,
            "op": plan.edits[index].op,
            "parameters": plan.recipe.edits[index].model_dump(mode="json", by_alias=True),
            "regions": [
                [list(step.target.region.start), list(step.target.region.stop)] for step in own
            ],
        }
        for index, own in grouped.items()
    ]
