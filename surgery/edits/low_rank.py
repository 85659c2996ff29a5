"""`low_rank`: W += scale · u vᵀ, from factors in a safetensors file.

For a module y = Wx, u [out, rank] lies along its output and v [in, rank] along its input, however
the checkpoint stores W: one file serves a Linear [out, in] and a Conv1D [in, out]. An embedding
takes a token and gives a row: u [width, rank], v [rows, rank]. The file holds `<tensor>.u` and
`<tensor>.v` for each tensor; vectors are factors of rank one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from surgery.arch import Architecture, Role
from surgery.checkpoint import TensorFile
from surgery.edits.changes import (
    Factor,
    Product,
    TensorChanges,
    input_axis,
    roles_of,
)
from surgery.edits.interface import Fields, RecipeFiles
from surgery.errors import RecipeError, describe


class LowRankFields(Fields):
    """`{op: low_rank, file: uv.safetensors, scale: 1.0}`."""

    op: Literal["low_rank"]
    file: str
    scale: float = 1.0

    def build(self, arch: Architecture, files: RecipeFiles) -> LowRankEdit:
        file = TensorFile.open(files.path(self.file))
        roles = roles_of(arch, _names(file), file.path)
        return LowRankEdit({name: self._product(arch, file, name, roles[name]) for name in roles})

    def _product(self, arch: Architecture, file: TensorFile, name: str, role: Role) -> Product:
        axis = input_axis(arch, role, file.path)
        return Product(Factor(file, f"{name}.u"), Factor(file, f"{name}.v"), self.scale, axis)


def _names(file: TensorFile) -> list[str]:
    """The tensors the file has both factors for; raises `RecipeError` where one is missing."""
    names = list(dict.fromkeys(key[:-2] for key in file.tensors if key.endswith((".u", ".v"))))
    odd = set(file.tensors) ^ {f"{name}.{factor}" for name in names for factor in "uv"}
    if odd or not names:
        raise RecipeError(
            f"{file.path}: expected NAME.u and NAME.v for each tensor; "
            f"without its pair: {describe(sorted(odd)) or 'nothing there'}"
        )
    return names


@dataclass(frozen=True)
class LowRankEdit(TensorChanges):
    """y ↦ y + scale · u(vᵀx) for the module of each tensor."""

    op: ClassVar[str] = "low_rank"
