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
W = TypeVar("W")
Scored = tuple[tuple[int, ...], float]


def select(
    columns: tuple[str, ...],
    written: list[W] | None,
    file: str | None,
    top: int | None,
    files: RecipeFiles,
    parse: Callable[[W], A],
    make: Callable[..., A],
) -> tuple[A, ...]:
    """The addresses a recipe entry names, either as a list or as `file` with `top`.

    An address has a number for each of `columns`, the last of which is what it is called. A CSV
    has these columns and optionally `score`; with `top`, the rows of
    highest score are taken (first rows where there is no score). Raises `RecipeError` where
    neither or both are given, the file is malformed, an address comes twice or none comes.
    """
    noun = columns[-1]
    if (written is None) == (file is None):
        raise RecipeError(f"give either {noun}s or file")
    if top is not None and file is None:
        raise RecipeError("top goes with file")
    if file is None:
        chosen = [parse(address) for address in written or []]
    else:
        rows = _read_csv(files.path(file), columns)
        chosen = [make(*indices) for indices, _ in _best(rows, top)]
    if not chosen:
        raise RecipeError(f"no {noun} is selected; name at least one")
    [(commonest, times)] = Counter(chosen).most_common(1)
    if times > 1:
        raise RecipeError(f"{commonest} is named twice")
    return tuple(chosen)


def _best(rows: list[Scored], top: int | None) -> list[Scored]:
    # sorted() is stable, so rows without a score keep the order of the file.
    return rows if top is None else sorted(rows, key=lambda row: -row[1])[:top]


def _read_csv(path: Path, columns: tuple[str, ...]) -> list[Scored]:
    try:
        text = read_small(path, MAX_CSV_BYTES).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text), strict=True)
        rows, found = list(reader), list(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(f"{path}: not a CSV file: {quote(error)}") from None
    once = all(found.count(column) == 1 for column in columns)
    if not rows or not once or found.count("score") > 1:
        expected = ",".join(columns)
        raise RecipeError(f"{path}: expected the columns {expected}[,score] and rows below them")
    return [_row(path, line, row, columns) for line, row in enumerate(rows, start=2)]


def _row(path: Path, line: int, row: dict[str, str], columns: tuple[str, ...]) -> Scored:
    try:
        if None in row or None in row.values():
            raise ValueError("more or fewer values than columns")
        indices, score = tuple(int(row[c]) for c in columns), float(row.get("score") or 0)
    except (TypeError, ValueError):
        expected = ",".join(columns)
        raise RecipeError(f"{path}: line {line} is not {expected}[,score] in numbers") from None
    if min(indices) < 0 or not math.isfinite(score):
        raise RecipeError(f"{path}: line {line} has a negative index or a score that is no number")
    return indices, score
