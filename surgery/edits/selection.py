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
        rows = read_scores(files.path(file), columns)
        chosen = [make(*indices) for indices, _ in best(rows, top)]
    if not chosen:
        raise RecipeError(f"no {noun} is selected; name at least one")
    [(commonest, times)] = Counter(chosen).most_common(1)
    if times > 1:
        raise RecipeError(f"{commonest} is named twice")
    return tuple(chosen)


def best(rows: list[Scored], top: int | None) -> list[Scored]:
    """The `top` rows of highest score, or all of them.

    The first of those that tie, or have none.
    """
    # sorted() is stable, so rows without a score keep the order of the file.
    return rows if top is None else sorted(rows, key=lambda row: -row[1])[:top]


def read_scores(path: Path, columns: tuple[str, ...], score: str | None = None) -> list[Scored]:
    """The rows of a CSV: a number for each of `columns`, and the score.

    That is the column `score`, or one of that name which need not be there. Raises `RecipeError`
    for a malformed file.
    """
    try:
        text = read_small(path, MAX_CSV_BYTES).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text), strict=True)
        rows, found = list(reader), list(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(f"{path}: not a CSV file: {quote(error)}") from None
    needed = columns if score is None else (*columns, score)
    expected = ",".join(needed) + ("[,score]" if score is None else "")
    once = all(found.count(column) == 1 for column in needed)
    if not rows or not once or found.count("score") > 1:
        raise RecipeError(f"{path}: expected the columns {expected} and rows below them")
    return [
        _row(f"{path}: line {line}", row, columns, score, expected)
        for line, row in enumerate(rows, start=2)
    ]


def _row(
    where: str, row: dict[str, str], columns: tuple[str, ...], score: str | None, expected: str
) -> Scored:
    try:
        if None in row or None in row.values():
            raise ValueError("more or fewer values than columns")
        indices = tuple(int(row[c]) for c in columns)
        number = float(row[score] if score else row.get("score") or 0)
    except (TypeError, ValueError):
        raise RecipeError(f"{where} is not {expected} in numbers") from None
    if min(indices) < 0 or not math.isfinite(number):
        raise RecipeError(f"{where} has a negative index, or its {score or 'score'} is no number")
    return indices, number
