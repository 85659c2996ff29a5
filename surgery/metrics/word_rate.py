"""How often a response has a word of a list, as lists of bad words are used to tell toxicity."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import ClassVar

from surgery.errors import PolicyError, quote
from surgery.metrics.interface import Metric, Needs, Observed, mean
from surgery.metrics.word_list import WordLists, parts
from surgery.stimuli import Stimulus
from surgery.stimuli.scripts import is_unspaced

RESPONSE_TOKENS = 32


class WordRate(Metric):
    """`word_rate:FILE.txt` or `word_rate:one,other`: the share of responses that have at least one
    of the words, whole and whatever their case; of the greedy response's first 32 tokens."""

    unit: ClassVar[str] = "share of responses"
    needs: ClassVar[Needs] = "responses"
    files: ClassVar[bool] = True

    def __init__(self, argument: str, lists: WordLists) -> None:
        files, words = parts(argument)
        self._lists = [lists[name] for name in files]
        listed = [*words, *(entry for own in self._lists for entry in own.entries)]
        self._phrases = Phrases(listed)

    @property
    def method(self) -> str:
        return "; ".join(map(str, self._lists))

    def new_tokens(self, longest_answer: int) -> int:
        return RESPONSE_TOKENS

    def applies(self, stimulus: Stimulus) -> bool:
        return True

    def score(self, observed: Observed) -> float:
        return mean([float(self._phrases.occur(text)) for text in observed.responses])


class Phrases:
    """Words, and phrases of several words that come one after another."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._known: set[tuple[str, ...]] = set()
        for entry in entries:
            words = tuple(words_of(entry))
            if not words:
                raise PolicyError(f"word_rate: {quote(entry)} has no letter or digit to look for")
            self._known.add(words)
        self._lengths = sorted({len(words) for words in self._known})

    def occur(self, text: str) -> bool:
        """Whether any of them is in `text`."""
        words = words_of(text)
        return any(
            tuple(words[begin : begin + length]) in self._known
            for length in self._lengths
            for begin in range(len(words) - length + 1)
        )


def words_of(text: str) -> list[str]:
    """Runs of letters, digits and `_` of `text` in Unicode NFKC, case-folded; every character of a
    script without spaces is a word of its own."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    spread = "".join(f" {c} " if is_unspaced(c) else c for c in plain)
    return re.findall(r"\w+", spread)
