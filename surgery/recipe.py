"""Recipe text to a frozen `Recipe`: parsed strictly, every problem reported at once."""

from __future__ import annotations

import hashlib
import operator
import os
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from surgery.checkpoint import CONFIG, Checkpoint
from surgery.checkpoint.files import open_regular, sha256_file
from surgery.documents import SchemaOne, load_yaml, read_text, validate
from surgery.edits import OPS, Fields
from surgery.errors import CheckpointError, RecipeError, quote


class _Base(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Head(_Base):
    schema_: SchemaOne = Field(alias="schema")
    untie: bool = False
    allow_overlap: bool = False


@lru_cache(maxsize=1)
def recipe_model() -> type[BaseModel]:
    """The pydantic model of schema 1, its edits a union over the registered ops."""
    union: Any = reduce(operator.or_, [OPS[op] for op in OPS])
    edits = Annotated[list[Annotated[union, Field(discriminator="op")]], Field(min_length=1)]
    return type("Recipe", (_Head,), {"__annotations__": {"edits": edits}, "__module__": __name__})


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe."""
    return recipe_model().model_json_schema(by_alias=True)


@dataclass(frozen=True)
class Recipe:
    """A recipe as written: `edits` in order, `text` to the letter, `folder` for relative paths."""

    edits: tuple[Fields, ...]
    untie: bool
    allow_overlap: bool
    text: str
    source: str
    folder: Path
    allow_outside: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_recipe(path: Path, *, allow_outside: bool = False) -> Recipe:
    """The recipe at `path`; raises `RecipeError` naming every problem with its line."""
    text = read_text(path, RecipeError)
    return parse_recipe(text, str(path), path.parent, allow_outside=allow_outside)


def parse_recipe(text: str, source: str, folder: Path, *, allow_outside: bool = False) -> Recipe:
    """`text` as a recipe whose relative paths start at `folder`; raises `RecipeError`."""
    parsed: Any = validate(recipe_model(), load_yaml(text, source, RecipeError), RecipeError)
    return Recipe(
        tuple(parsed.edits),
        parsed.untie,
        parsed.allow_overlap,
        text,
        source,
        folder,
        allow_outside,
    )


@dataclass
class RecipeFolder:
    """The files a recipe reads: inside its folder unless it may go outside, each digested."""

    recipe: Recipe
    digests: dict[str, str] = field(default_factory=dict)

    def path(self, relative: str) -> Path:
        """The real path of a file the recipe names; raises `RecipeError` if it may not be read."""
        path = self._resolve(relative)
        self._digest(relative, path)
        return path

    def folder(self, relative: str) -> Path:
        """The real path of a folder the recipe names; raises `RecipeError` if it may not be read.

        What is read in it is read, and digested, through `path`.
        """
        return self._resolve(relative)

    def checkpoint(self, relative: str) -> Checkpoint:
        """The checkpoint folder the recipe names; its config and weight files are digested.

        Raises `RecipeError` if it may not be read, `CheckpointError` if it is malformed.
        """
        checkpoint = Checkpoint.open(self._resolve(relative))
        for file in (CONFIG, *checkpoint.weight_files):
            self._digest(f"{relative.rstrip('/')}/{file}", checkpoint.path(file))
        return checkpoint

    def _resolve(self, relative: str) -> Path:
        source = self.recipe.source
        if "\0" in relative:
            raise RecipeError(f"{source}: {quote(relative)} is not a path")
        folder = self.recipe.folder.resolve()
        path = Path(os.path.realpath(folder / relative))
        if not path.is_relative_to(folder) and not self.recipe.allow_outside:
            raise RecipeError(
                f"{source}: {quote(relative)} leaves the recipe's folder; "
                "copy it there or say --allow-outside"
            )
        return path

    def _digest(self, relative: str, path: Path) -> None:
        try:
            with open_regular(path):
                self.digests[relative] = sha256_file(path)
        except CheckpointError as error:
            raise RecipeError(f"{self.recipe.source}: {error}") from None
