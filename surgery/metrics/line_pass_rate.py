"""Line pass rate: how often a model answers in the language it was asked in.

The metric of the Language Confusion Benchmark (Marchisio et al. 2024, arXiv 2406.20052): a
response fails when any of its lines is in a language that was not asked for. What differs here
from the official code is the detector: py3langid with normalised probabilities, restricted to the
languages of the comparison, in place of fastText lid.176. Figures are comparable only between
runs of the same detector and the same languages; ``DETECTOR`` belongs beside every figure.

Lines are counted in tokens split at white space; in scripts written without spaces every
character counts.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache

from surgery.stimuli.scripts import is_unspaced

DETECTOR = "py3langid, normalised probabilities"
UNKNOWN = "unknown"
"""The language of a line the detector is not sure of; never an accepted one."""
MIN_CONFIDENCE = 0.3
MIN_TOKENS = 5

Detector = Callable[[str], tuple[str, float]]
"""A line of text to (language code, probability)."""


def is_punctuation(character: str) -> bool:
    """Whether a character is punctuation: Unicode category P, or one of ASCII's symbols."""
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def drop_punctuation(line: str) -> str:
    """The line without punctuation, which tells nothing of its language.

    The official code drops that of ASCII and the Arabic comma; here that of every script goes.
    As there, words on both sides of a dash stay apart.
    """
    apart = line.replace("—", " ")
    return "".join(character for character in apart if not is_punctuation(character)).strip()


def count_tokens(line: str) -> int:
    """The number of words of a line; every character of a script without spaces counts as one.

    The official code cuts Chinese by jieba and Japanese by fugashi, whose words are one or two
    characters long: at five tokens and more, both count nearly the same lines.
    """
    return sum(map(is_unspaced, line)) + len(words_of_line(line))


def words_of_line(line: str) -> list[str]:
    """The words of a line that are not of a script without spaces."""
    return "".join(" " if is_unspaced(character) else character for character in line).split()


def counted_lines(
    response: str,
    *,
    min_tokens: int = MIN_TOKENS,
) -> list[str]:
    """The lines of a response that are judged, in order and without punctuation.

    The response ends at "\\nQ:", where a base model starts to ask itself the next question; lines
    of fewer than ``min_tokens`` tokens are too short to tell a language by.
    """
    answer = response.split("\nQ:", 1)[0]
    lines = (drop_punctuation(line) for line in answer.split("\n"))
    return [line for line in lines if line and count_tokens(line) >= min_tokens]


def langid_detector(languages: Collection[str] | None = None) -> Detector:
    """A py3langid detector that chooses among ``languages`` (ISO 639-1; None: all it knows).

    Each choice of languages has its own copy of the model, so that two do not disturb each other;
    loading takes about a second, and is done once.

    Raises:
        ValueError: a language py3langid does not know.
    """
    return _langid_detector(None if languages is None else tuple(sorted(set(languages))))


@cache
def _langid_detector(languages: tuple[str, ...] | None) -> Detector:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if languages is not None:
        identifier.set_languages(list(languages))

    def detect(line: str) -> tuple[str, float]:
        language, probability = identifier.classify(line)
        return language, float(probability)

    return detect


def line_language(line: str, detect: Detector, *, min_confidence: float = MIN_CONFIDENCE) -> str:
    """The line's language, or ``UNKNOWN`` where the confidence is not above the limit."""
    language, confidence = detect(line)
    return language if confidence > min_confidence else UNKNOWN


def line_languages(
    response: str,
    detect: Detector,
    *,
    min_tokens: int = MIN_TOKENS,
    min_confidence: float = MIN_CONFIDENCE,
) -> list[str]:
    """The language of every counted line; empty for a response with nothing to judge."""
    lines = counted_lines(response, min_tokens=min_tokens)
    return [line_language(line, detect, min_confidence=min_confidence) for line in lines]


def line_pass_rate(
    responses: Sequence[str],
    languages: Sequence[Sequence[str]],
    *,
    detect: Detector | None = None,
    candidates: Iterable[str] | None = None,
    min_tokens: int = MIN_TOKENS,
    min_confidence: float = MIN_CONFIDENCE,
) -> float:
    """1 − (responses with a line in a wrong language) / (responses counted), in [0, 1].

    Args:
        responses: what the model wrote, one per prompt.
        languages: per response the accepted language codes.
        detect: line to (language, confidence); by default ``langid_detector(candidates)``.
        candidates: the languages the default detector may answer (default: all it knows).
        min_tokens: lines with fewer tokens are dropped.
        min_confidence: at or below it a line is ``UNKNOWN``, and so wrong.

    Returns:
        The rate; NaN when no response has a counted line, since nothing was measured.

    Raises:
        ValueError: ``responses`` and ``languages`` are of unlike length.
    """
    judge = detect or langid_detector(None if candidates is None else list(candidates))
    counted = wrong = 0
    for response, accepted in zip(responses, languages, strict=True):
        found = line_languages(
            response, judge, min_tokens=min_tokens, min_confidence=min_confidence
        )
        counted += bool(found)
        wrong += any(language not in accepted for language in found)
    return 1 - wrong / counted if counted else float("nan")
