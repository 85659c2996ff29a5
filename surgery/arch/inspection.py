"""What a checkpoint is, from its headers alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery.arch import identify
from surgery.checkpoint import Checkpoint


@dataclass(frozen=True)
class TensorRow:
    """One stored tensor; `role` is `ignored` for buffers the family lists as such."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """Family, sizes, dtypes (bytes of each), ties and every tensor with its role."""

    model: Path
    family: str
    kind: str
    sizes: dict[str, int]
    dtypes: dict[str, int]
    parameters: int
    tied: bool
    tensors: tuple[TensorRow, ...]
    not_carried: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "model": str(self.model)}


def inspect(model: Path, *, allow_code: bool = False) -> Inspection:
    """Reads the headers of checkpoint folder `model`; raises `InputError` for an unusable one."""
    checkpoint = Checkpoint.open(model, allow_code=allow_code)
    arch = identify(checkpoint)
    rows = tuple(
        TensorRow(
            name,
            str(arch.roles[name]) if name in arch.roles else "ignored",
            info.dtype,
            info.shape,
            info.file,
            info.nbytes,
        )
        for name, info in checkpoint.tensors.items()
    )
    dtypes: Counter[str] = Counter()
    for row in rows:
        dtypes[row.dtype] += row.nbytes
    return Inspection(
        model,
        arch.family,
        arch.facts.kind,
        dict(arch.sizes),
        dict(dtypes),
        sum(math.prod(row.shape) for row in rows),
        arch.tied,
        rows,
        checkpoint.not_carried,
    )
