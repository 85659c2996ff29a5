"""`tensor`: put given numbers into tensors, or into boxes of them.

The file's tensors are named as the model's. Each replaces the whole tensor of its name, or, with
`at`, the box of its own shape that begins at the given index, in stored order. Numbers are taken
in the tensor's compute dtype and rounded to its stored one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt

from surgery.arch import Architecture
from surgery.checkpoint import TensorFile
from surgery.edits.changes import Replacement, TensorChanges, roles_of
from surgery.edits.interface import Fields, RecipeFiles
from surgery.errors import RecipeError, quote


class TensorFields(Fields):
    """`{op: tensor, file: patch.safetensors}`; `at: {NAME: [row, column]}` for a box of NAME."""

    op: Literal["tensor"]
    file: str
    at: dict[str, list[NonNegativeInt]] = Field(default_factory=dict)

    def build(self, arch: Architecture, files: RecipeFiles) -> TensorEdit:
        file = TensorFile.open(files.path(self.file))
        for name in self.at:
            if name not in file.tensors:
                raise RecipeError(f"at names {quote(name)}, which {file.path} does not hold")
        if not file.tensors:
            raise RecipeError(f"{file.path}: holds no tensor")
        roles_of(arch, file.tensors, file.path)
        start = {name: tuple(index) for name, index in self.at.items()}
        return TensorEdit({n: Replacement(file, n, start.get(n)) for n in file.tensors})


@dataclass(frozen=True)
class TensorEdit(TensorChanges):
    """The named tensors hold the given numbers."""

    op: ClassVar[str] = "tensor"
