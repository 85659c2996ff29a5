"""Confusion points: the first English token of a response in the wrong language."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from surgery.errors import FindError
from surgery.find.prompts.confusion import Judge, find_slip

GERMAN = "Die Hauptstadt von Frankreich heißt seit langer Zeit Paris."
ENGLISH = "The capital of the country called France is the city of Paris."
RUSSIAN = "Столица этой страны называется город Париж."


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(["de", "ru"])


def slip(text: str, language: str, judge: Judge) -> tuple[int | None, str] | None:
    """The point of a response whose tokens are words with the space before them, and the token."""
    pieces = [piece for word in text.split(" ") for piece in (" ", *_lines(word))][1:]

    def decode(tokens: Sequence[int]) -> str:
        return "".join(pieces[token] for token in tokens)

    found = find_slip(range(len(pieces)), decode, (language,), judge)
    if found is None:
        return None
    return found.point, "" if found.point is None else pieces[found.point]


def _lines(word: str) -> list[str]:
    first, *rest = word.split("\n")
    return [first, *("\n" + line for line in rest)]


def test_a_right_response_has_no_slip(judge: Judge) -> None:
    assert slip(GERMAN, "de", judge) is None
    assert slip(ENGLISH, "en", judge) is None
    assert slip(RUSSIAN, "ru", judge) is None


def test_the_point_is_the_first_english_token(judge: Judge) -> None:
    assert slip(ENGLISH, "ru", judge) == (0, "The")
    assert slip(f"— {ENGLISH}", "ru", judge) == (2, "The")
    assert slip(f"12 Париж {ENGLISH} {ENGLISH}", "ru", judge) == (4, "The")


def test_a_token_of_another_language_or_script_is_passed_over(judge: Judge) -> None:
    assert slip(f"Hauptstadt: {ENGLISH} {ENGLISH}", "ru", judge) == (2, "The")


def test_the_search_starts_after_the_right_lines(judge: Judge) -> None:
    """An English word in a German line is nothing to find, and the same word alone would be."""
    mixed = f"You {GERMAN} {GERMAN}"
    assert slip(f"{ENGLISH}\n{mixed}", "de", judge) == (0, "The")
    found = slip(f"{mixed}\n{ENGLISH}", "de", judge)
    assert found is not None and found[0] is not None
    assert found[0] > 20 and found[1] == "\nThe"


def test_lines_after_the_next_question_are_not_judged(judge: Judge) -> None:
    assert slip(f"{GERMAN}\nQ: {ENGLISH}", "de", judge) is None


def test_in_chinese_any_ascii_letter_is_a_slip() -> None:
    judge = Judge(["zh", "de"])
    assert slip(f"。 Hauptstadt {ENGLISH}", "zh", judge) == (2, "Hauptstadt")


def test_a_wrong_line_without_an_english_token_has_no_point(judge: Judge) -> None:
    assert slip(RUSSIAN, "de", judge) == (None, "")


def test_a_token_is_read_with_what_follows_until_the_detector_is_sure(judge: Judge) -> None:
    """It knows "The" not at all and takes "In" for German, but not for sure."""
    assert not judge.is_english(["The"])
    assert judge.is_english(["The", "The money"])
    assert not judge.is_english(["In", "In der", "In der money that the people"])
    assert slip(f"In the country the {ENGLISH}", "ru", judge) == (0, "In")


def test_what_follows_ends_with_the_line(judge: Judge) -> None:
    assert slip(f"{RUSSIAN}\nThe\n{ENGLISH} {ENGLISH}", "ru", judge) is not None
    found = slip(f"{RUSSIAN}\nThe\n{ENGLISH}", "ru", judge)
    assert found is not None and found[1] == "\nThe" and found[0] == 12


def test_a_language_the_detector_does_not_know_is_refused() -> None:
    with pytest.raises(FindError, match="languages en, xx: "):
        Judge(["xx"])
