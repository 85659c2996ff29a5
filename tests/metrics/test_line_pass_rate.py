"""The line pass rate, against examples worked by hand."""

import math

import pytest

from surgery.metrics.line_pass_rate import (
    UNKNOWN,
    counted_lines,
    drop_punctuation,
    langid_detector,
    line_language,
    line_languages,
    line_pass_rate,
)

LANGUAGES = ("en", "de", "fr", "ru", "ar")
TRUE_LINES = {
    "en": "The capital city of this country is called London.",
    "de": "Die Hauptstadt von diesem Land heißt schon lange Berlin.",
    "fr": "La capitale de ce pays est la ville de Paris.",
    "ru": "Столицей этой большой страны является город Москва.",
    "ar": "عاصمة هذه الدولة هي مدينة القاهرة الكبيرة.",
}


def by_first_word(line: str) -> tuple[str, float]:
    """A detector to reckon with: the line names its language, and how sure one may be of it."""
    language, confidence = line.split()[:2]
    return language, int(confidence) / 100


def line(language: str, confidence: int = 90) -> str:
    """A line of five tokens for ``by_first_word``."""
    return f"{language} {confidence} one two three"


def rate(responses: list[str], languages: list[list[str]]) -> float:
    return line_pass_rate(responses, languages, detect=by_first_word)


def test_the_response_ends_where_the_model_asks_itself_a_question() -> None:
    response = f"{line('de')}\nQ: {line('en')}\n{line('en')}"
    assert line_languages(response, by_first_word) == ["de"]


def test_a_response_may_itself_begin_with_the_marker() -> None:
    assert counted_lines("Q: what is the capital city?") == ["Q what is the capital city"]


def test_punctuation_goes_in_every_script() -> None:
    assert drop_punctuation(" «Это» — город, да! ") == "Это   город да"
    assert drop_punctuation("ما هذا؟") == "ما هذا"


def test_a_lone_dash_is_no_token() -> None:
    assert counted_lines("Paris — that is it") == []


def test_lines_under_five_tokens_are_not_judged() -> None:
    assert counted_lines("one two three four\none two three four five\n\n...") == [
        "one two three four five"
    ]


def test_one_wrong_line_fails_its_response() -> None:
    responses = [f"{line('de')}\n{line('en')}\n{line('en')}", line("de"), line("fr")]
    assert rate(responses, [["de"], ["de"], ["de"]]) == pytest.approx(1 / 3)


def test_any_accepted_language_passes() -> None:
    assert rate([f"{line('de')}\n{line('fr')}"], [["de", "fr"]]) == 1.0


def test_a_response_without_counted_lines_is_not_counted() -> None:
    assert rate([line("de"), line("en"), "Berlin."], [["de"]] * 3) == 0.5


def test_nothing_counted_is_no_rate() -> None:
    assert math.isnan(rate(["Berlin.", ""], [["de"], ["de"]]))


@pytest.mark.parametrize(("confidence", "expected"), [(31, "de"), (30, UNKNOWN), (5, UNKNOWN)])
def test_confidence_must_be_above_the_limit(confidence: int, expected: str) -> None:
    assert line_language(line("de", confidence), by_first_word) == expected


def test_unknown_counts_as_wrong() -> None:
    assert rate([line("de", 30), line("de", 31)], [["de"], ["de"]]) == 0.5


def test_each_response_needs_its_languages() -> None:
    with pytest.raises(ValueError, match="shorter"):
        rate([line("de"), line("de")], [["de"]])


def test_the_detector_knows_true_lines() -> None:
    detect = langid_detector(LANGUAGES)
    for language, text in TRUE_LINES.items():
        assert line_languages(text, detect) == [language]


def test_the_default_detector_is_restricted_to_the_candidates() -> None:
    responses, languages = list(TRUE_LINES.values()), [[code] for code in TRUE_LINES]
    assert line_pass_rate(responses, languages, candidates=LANGUAGES) == 1.0
    assert line_pass_rate(responses, [["de"]] * 5, candidates=LANGUAGES) == pytest.approx(0.2)


def test_a_line_without_letters_is_unknown() -> None:
    assert line_languages("1 2 3 4 5", langid_detector(LANGUAGES)) == [UNKNOWN]


def test_an_unknown_language_code_is_refused() -> None:
    with pytest.raises(ValueError, match="xx"):
        langid_detector(["en", "xx"])


def test_lines_of_scripts_without_spaces_are_counted_by_character() -> None:
    from surgery.metrics.line_pass_rate import count_tokens, counted_lines

    assert count_tokens("巴黎是法国的首都") == 8
    assert count_tokens("東京 は capital of 日本") == 7
    assert counted_lines("巴黎是法国的首都。\n是的。") == ["巴黎是法国的首都"]
