"""Lists of words that a metric's name mentions: one word or phrase a line, in a text file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from surgery.documents import read_text
from surgery.errors import PolicyError, quote

SUFFIX = ".txt"
MAX_FILE_BYTES = 4 << 20
MAX_WORDS = 400_000


@dataclass(frozen=True)
class WordList:
    """The lines of a file that hold anything and are no comments (`#`), stripped."""

    name: str
    entries: tuple[str, ...]
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}, {len(self.entries)} words, SHA-256 {self.sha256[:12]}"


WordLists = Mapping[str, WordList]


def parts(argument: str) -> tuple[list[str], list[str]]:
    """What an argument lists between commas: the files, which end in `.txt`, and the rest."""
    listed = [part.strip() for part in argument.split(",")]
    files = [part for part in listed if part.endswith(SUFFIX)]
    return files, [part for part in listed if not part.endswith(SUFFIX)]


def read_word_lists(arguments: Iterable[str], folder: Path) -> dict[str, WordList]:
    """Every file that `arguments` name, by the name given.

    Names are relative to `folder`, and files are inside of it. Raises `PolicyError` for one that
    is not, that cannot be read, that is too large or that lists nothing.
    """
    names = dict.fromkeys(name for argument in arguments for name in parts(argument)[0])
    return {name: _read(name, folder) for name in names}


def _read(name: str, folder: Path) -> WordList:
    path = (folder / name).resolve()
    if PurePosixPath(name).is_absolute() or not path.is_relative_to(folder.resolve()):
        raise PolicyError(
            f"word list {quote(name)} is outside of {folder}; copy it there and name it so"
        )
    text = read_text(path, PolicyError, MAX_FILE_BYTES)
    lines = [line.strip() for line in text.split("\n")]
    entries = tuple(line for line in lines if line and not line.startswith("#"))
    if not 0 < len(entries) <= MAX_WORDS:
        raise PolicyError(
            f"{path}: lists {len(entries)} words; expected 1 to {MAX_WORDS}, one a line"
        )
    return WordList(name, entries, hashlib.sha256(text.encode()).hexdigest())
