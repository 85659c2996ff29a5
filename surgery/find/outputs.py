"""The files of a search: the recipe, its tensors, every candidate as CSV, the figures as JSON."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from surgery.checkpoint.staging import refuse_inside
from surgery.errors import OutputError
from surgery.find.interface import Ranking
from surgery.find.recipes import recipe_text, save_tensors
from surgery.find.result import Found
from surgery.report.model import plain

FOUND = "Found by surgery"
"""How the first line of a recipe of ours begins; files beside such a recipe are ours as well."""


@dataclass(frozen=True)
class Outputs:
    """Where the files of a search go: `recipe` as named, the others beside it under its name, or
    the figures where `report` says."""

    recipe: Path
    report: Path | None = None

    @property
    def tensors(self) -> Path:
        return self.recipe.with_suffix(".safetensors")

    @property
    def table(self) -> Path:
        return self.recipe.with_suffix(".csv")

    @property
    def figures(self) -> Path:
        return self.report or self.recipe.with_suffix(".json")

    def check(self, folders: Iterable[Path]) -> None:
        """Raises `OutputError` where writing could harm anything but an older search's files;
        `folders` are only read."""
        if self.recipe.suffix not in (".yaml", ".yml"):
            raise OutputError(f"{self.recipe}: a recipe's name ends in .yaml")
        targets = (self.recipe, self.tensors, self.table, self.figures)
        for target in targets:
            if target.is_dir() or not target.absolute().parent.is_dir():
                raise OutputError(f"{target}: must name a file in a folder that exists")
            for folder in folders:
                refuse_inside(target, folder)
        present = [target for target in targets if target.exists()]
        if present and not _is_ours(self.recipe):
            raise OutputError(f"{present[0]}: exists and is not of an earlier search; name another")

    def write(self, found: Found) -> None:
        """Each file is there whole or as it was."""
        folder = self.recipe.absolute().parent
        with tempfile.TemporaryDirectory(prefix=f".{self.recipe.name}.", dir=folder) as staging:
            staged = Path(staging)
            texts = {
                self.table: table_of(found.ranking),
                self.figures: _json(found),
                self.recipe: recipe_text(found.proposal, folder, _heading(found)),
            }
            save_tensors(found.proposal, staged / self.tensors.name)
            for path, text in texts.items():
                (staged / path.name).write_text(text, encoding="utf-8")
            for path in (self.tensors, *texts):
                if (staged / path.name).exists():
                    (staged / path.name).replace(path)


def _is_ours(recipe: Path) -> bool:
    if not recipe.is_file():
        return False
    with recipe.open("rb") as file:
        return file.read(len(FOUND) + 2) == f"# {FOUND}".encode()


def _heading(found: Found) -> list[str]:
    effect, random = found.effect, found.control
    bound = random.bound(found.sign)
    ours = f"{FOUND} {version('weight-surgery')}"
    lines = [
        f"{ours}: {found.kind}, method {found.method}, to {found.direction} {effect.metric}, "
        f"seed {found.seed}.",
        f"On {effect.count:.0f} held-out prompts {effect.metric} went from {effect.before:.4g} to "
        f"{effect.after:.4g}; {len(random.changes)} random edits of equal size changed it by "
        f"{random.mean:+.3g} on average, 95 % of them by no more than {bound:+.3g}.",
    ]
    return lines + ([] if found.above_chance else [f"No better than chance: {found.why_not}."])


def _json(found: Found) -> str:
    return json.dumps(plain(found.to_json()), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def table_of(ranking: Ranking) -> str:
    """Every candidate, the best first; numbers as Python writes them, which read back exactly."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(ranking.columns)
    writer.writerows(ranking.rows)
    return text.getvalue()
