"""Where a model slips into English: the confusion points of its own greedy responses.

Nie, Schmid and Schütze 2025, arXiv 2505.16538: of a response in the wrong language, the first new
token that is English by the detector and starts with an ASCII letter, so neither empty nor
punctuation; in Chinese, any token that starts with one. The scoring prompt is all before it.

What the official code leaves open or does otherwise:

- The detector is py3langid on a few languages, not fastText on 176, and one short token often tells
  it nothing: it is not sure of "The". Until it gives one language more than half, the tokens after
  it on the line are read with it.
- A response is wrong where a line of it is, as the line pass rate counts lines. The search starts
  after the lines that were right before it. The official code takes only responses without any
  right line, where that is the same.
- The scoring prompt is kept as tokens; decoding it and encoding it again could give others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from surgery.errors import FindError
from surgery.metrics.line_pass_rate import (
    DETECTOR,
    langid_detector,
    line_languages,
)

ENGLISH, CHINESE = "en", "zh"
SURE = 0.5
"""The detector's probability of a language above which a token is of it."""

_detector = lru_cache(maxsize=8)(langid_detector)
"""Of the same languages the same: loading one takes a second."""

Decode = Callable[[Sequence[int]], str]


class Judge:
    """Tells lines and tokens of some languages apart, English always among them."""

    def __init__(self, languages: Iterable[str]) -> None:
        self.languages = tuple(sorted({ENGLISH, *languages}))
        try:
            self._detect = _detector(self.languages)
        except ValueError as error:
            raise FindError(f"languages {', '.join(self.languages)}: {error}") from None

    @property
    def name(self) -> str:
        return f"{DETECTOR}, languages {', '.join(self.languages)}"

    def of_line(self, line: str) -> str | None:
        """The language of one line, None where it is too short to be counted."""
        return next(iter(line_languages(line, self._detect)), None)

    def is_english(self, texts: Iterable[str]) -> bool:
        """Whether the first of `texts` that the detector is sure of is English: a token, and it
        with more and more of what follows it."""
        found = (self._detect(text) for text in texts)
        return next((code for code, sure in found if sure > SURE), None) == ENGLISH


@dataclass(frozen=True)
class Slip:
    """A response in a wrong language: `point` is the index of its first English token, None where
    no token passes for one."""

    point: int | None


def find_slip(
    tokens: Sequence[int], decode: Decode, accepted: Collection[str], judge: Judge
) -> Slip | None:
    """Where the response of new `tokens` slips into English; None where it is in order.

    accepted: the languages it may be in.
    """
    first = _lines_in_order(decode(tokens), accepted, judge)
    if first is None:
        return None
    later = (i for i in range(len(tokens)) if _line(tokens, i, decode) >= first)
    latin = (i for i in later if _starts_latin(tokens[i], decode))
    english = (
        i for i in latin if CHINESE in accepted or judge.is_english(_texts(tokens, i, decode))
    )
    return Slip(next(english, None))


def _lines_in_order(response: str, accepted: Collection[str], judge: Judge) -> int | None:
    """How many lines there are up to the last right one before the first wrong one."""
    right = 0
    for number, line in enumerate(response.split("\nQ:", 1)[0].split("\n"), start=1):
        language = judge.of_line(line)
        if language is not None and language not in accepted:
            return right
        right = number if language is not None else right
    return None


def _line(tokens: Sequence[int], index: int, decode: Decode) -> int:
    """Which line a token is on, from 0; one that starts with a line break is on the next."""
    text = decode(tokens[index : index + 1])
    own = text[: len(text) - len(text.lstrip())]
    return decode(tokens[:index]).count("\n") + own.count("\n")


def _starts_latin(token: int, decode: Decode) -> bool:
    first = decode((token,)).strip()[:1]
    return first.isascii() and first.isalpha()


def _texts(tokens: Sequence[int], index: int, decode: Decode) -> Iterator[str]:
    """A token, and it with ever more of those after it, to the end of its line."""
    for end in range(index + 1, len(tokens) + 1):
        line, more, _ = decode(tokens[index:end]).lstrip().partition("\n")
        yield line.rstrip()
        if more:
            return
