"""Lists of heads or neurons: written in the recipe, or the best rows of a CSV of scores."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from surgery.checkpoint.files import read_small
from surgery.edits.interface import RecipeFiles
from surgery.errors import RecipeError, quote

MAX_CSV_BYTES = 64 << 20

A = TypeVar("A")


def select(
    noun: str,
    written: list[str] | None,
    file: str | None,
    top: int | None,
    files: RecipeFiles,
    parse: Callable[[str], A],
    make: Callable[[int, int], A],
) -> tuple[A, ...]:
    """The addresses a recipe entry names, either as a list or as `file` with `top`.

    A CSV has the columns `layer`, `<noun>` and optionally `score`; with `top`, the rows of
    highest score are taken (first rows where there is no score). Raises `RecipeError` where
    neither or both are given, the file is malformed, an address comes twice or none comes.
    """
    if (written is None) == (file is None):
        raise RecipeError(f"give either {noun}s or file")
    if top is not None and file is None:
        raise RecipeError("top goes with file")
    if file is None:
        chosen = [parse(address) for address in written or []]
    else:
        rows = _read_csv(files.path(file), noun)
        chosen = [make(layer, index) for layer, index, _ in _best(rows, top)]
    if not chosen:
        raise RecipeError(f"no {noun} is selected; name at least one")
    [(commonest, times)] = Counter(chosen).most_common(1)
    if times > 1:
        raise RecipeError(f"{commonest} is named twice")
    return tuple(chosen)


def _best(rows: list[tuple[int, int, float]], top: int | None) -> list[tuple[int, int, float]]:
    # sorted() is stable, so rows without a score keep the order of the file.
    return rows if top is None else sorted(rows, key=lambda row: -row[2])[:top]


def _read_csv(path: Path, noun: str) -> list[tuple[int, int, float]]:
    try:
        text = read_small(path, MAX_CSV_BYTES).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text), strict=True)
        rows, columns = list(reader), list(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(f"{path}: not a CSV file: {quote(error)}") from None
    once = all(columns.count(column) == 1 for column in ("layer", noun))
    if not rows or not once or columns.count("score") > 1:
        raise RecipeError(f"{path}: expected the columns layer,{noun}[,score] and rows below them")
    return [_row(path, line, row, noun) for line, row in enumerate(rows, start=2)]


def _row(path: Path, line: int, row: dict[str, str], noun: str) -> tuple[int, int, float]:
    try:
        if None in row or None in row.values():
            raise ValueError("more or fewer values than columns")
        layer, index, score = int(row["layer"]), int(row[noun]), float(row.get("score") or 0)
    except (TypeError, ValueError):
        raise RecipeError(f"{path}: line {line} is not layer,{noun}[,score] in numbers") from None
    if layer < 0 or index < 0 or not math.isfinite(score):
        raise RecipeError(f"{path}: line {line} has a negative index or a score that is no number")
    return layer, index, score
