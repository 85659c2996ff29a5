"""Initializers that are bytes of the checkpoint's own files: proven by their place alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.checkpoint.dtypes import numpy_dtype
from surgery.export.lineage.diagnosis import DTYPE, SHAPE, SHIFTED
from surgery.export.lineage.stored import Stored, place


@dataclass(frozen=True)
class Shards:
    """The weight files of a checkpoint by (device, inode), with their tensors in order."""

    files: Mapping[tuple[int, int], tuple[TensorInfo, ...]]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Shards:
        files = {}
        for shard, header in checkpoint.headers.items():
            facts = checkpoint.path(shard).stat()
            infos = sorted(header.tensors.values(), key=lambda info: info.begin)
            files[facts.st_dev, facts.st_ino] = tuple(infos)
        return cls(files)

    def tensors(self, stored: Stored) -> tuple[TensorInfo, ...] | None:
        """The tensors of the shard an initializer lies in; None if it lies in none."""
        where = place(stored)
        return None if where is None else self.files.get(where)


def resolve(stored: Stored, tensors: tuple[TensorInfo, ...]) -> str | tuple[str, str, str]:
    """The tensor whose bytes an initializer is; else (symptom, nearest tensor, what is off)."""
    begin, end = stored.offset, stored.offset + stored.nbytes
    for info in tensors:
        if (info.begin, info.end) == (begin, end):
            return _form(stored, info) or info.name
    overlaps = [info for info in tensors if info.begin < end and begin < info.end]
    if not overlaps:
        return SHIFTED, "", f"bytes {begin} to {end} of {stored.path} belong to no tensor"
    nearest = max(overlaps, key=lambda info: min(end, info.end) - max(begin, info.begin))
    off = begin - nearest.begin
    return (
        SHIFTED,
        nearest.name,
        f"it is bytes {begin} to {end} of {nearest.file}, where the tensor is bytes "
        f"{nearest.begin} to {nearest.end}: it begins {off:+d} bytes off",
    )


def _form(stored: Stored, info: TensorInfo) -> tuple[str, str, str] | None:
    """What is wrong with an initializer of the right bytes, if anything is."""
    if numpy_dtype(info.dtype) != stored.dtype:
        return DTYPE, info.name, f"the graph reads its bytes as {stored.dtype}, not {info.dtype}"
    if info.shape != stored.shape:
        found, wanted = list(stored.shape), list(info.shape)
        return SHAPE, info.name, f"the graph reads it as {found}, the checkpoint has {wanted}"
    return None
