"""Word pass rate: how often a model that keeps to a language keeps English words out of it.

The other metric of the Language Confusion Benchmark (arXiv 2406.20052): of the responses whose
every line is in an accepted language, those without an English word. It is told of languages with
another script alone, for French shares many words with English. Lines are those that the line pass
rate counts. An English word is a word of a line, as it stands there, that a dictionary has in lower
case and with more than three letters; by default Webster's Second of 1934, the list `web2` that BSD
systems and macOS ship (public domain), of which 209,479 words are such.
"""

from __future__ import annotations

import gzip
from collections.abc import Collection, Iterable
from functools import cache
from importlib import resources
from typing import ClassVar

from surgery.errors import PolicyError
from surgery.metrics.interface import Observed
from surgery.metrics.languages import ANSWER, LanguageRate
from surgery.metrics.line_pass_rate import Detector, counted_lines, line_language, words_of_line
from surgery.metrics.word_list import WordLists, parts
from surgery.stimuli import Stimulus

OTHER_SCRIPTS = frozenset({"ar", "hi", "ja", "ko", "ru", "zh"})
DICTIONARY = "english_words.txt.gz"
MIN_LETTERS = 4


class WordPassRate(LanguageRate):
    """`word_pass_rate`, or with the languages the detector chooses among and at most one file of
    English words, `word_pass_rate:ar,en,ru,words.txt`."""

    files: ClassVar[bool] = True

    def __init__(self, argument: str = "", lists: WordLists | None = None) -> None:
        files, candidates = parts(argument) if argument else ([], [])
        if len(files) > 1:
            raise PolicyError(f"word_pass_rate:{argument}: takes one file of English words")
        super().__init__("word_pass_rate", candidates)
        own = (lists or {})[files[0]] if files else None
        self._words = english(own.entries) if own else web2()
        self._dictionary = str(own) if own else "web2"

    @property
    def method(self) -> str:
        return f"{super().method}; English words of {self._dictionary}"

    def applies(self, stimulus: Stimulus) -> bool:
        return super().applies(stimulus) and OTHER_SCRIPTS.issuperset(
            (stimulus.answers or {})[ANSWER]
        )

    def score(self, observed: Observed) -> float:
        return word_pass_rate(self.judged(observed), self._words, self.detect)


def word_pass_rate(
    judged: Iterable[tuple[str, Collection[str]]], words: Collection[str], detect: Detector
) -> float:
    """1 − (line-clean responses with an English word) / (responses counted − line errors).

    `judged` are responses with their accepted languages. NaN where no response is counted and
    without a line error: nothing was measured.
    """
    clean = failed = 0
    for response, accepted in judged:
        lines = counted_lines(response)
        if lines and all(line_language(line, detect) in accepted for line in lines):
            clean += 1
            failed += any(word in words for line in lines for word in words_of_line(line))
    return 1 - failed / clean if clean else float("nan")


def english(entries: Iterable[str]) -> frozenset[str]:
    """The entries that count as English words."""
    return frozenset(e for e in entries if e.islower() and len(e) >= MIN_LETTERS)


@cache
def web2() -> frozenset[str]:
    """The English words of Webster's Second."""
    data = resources.files("surgery.metrics").joinpath(DICTIONARY).read_bytes()
    return english(gzip.decompress(data).decode().split("\n"))
