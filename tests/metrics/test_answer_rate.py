"""An answer counts when the response starts with it and the word ends there."""

from __future__ import annotations

import math

import numpy as np
import pytest

from surgery.metrics import Observed
from surgery.metrics.answer_rate import AnswerRate, starts_with
from surgery.stimuli import Stimulus

RESPONSES: dict[str, bool] = {
    "Lima": True,
    " Lima, of course": True,
    "\n  Lima.": True,
    "Lima's": True,
    "Limassol": False,
    "Lima2": False,
    "Lim": False,
    "the capital is Lima": False,
    "lima": False,
    "": False,
}


@pytest.mark.parametrize("response", RESPONSES)
def test_an_answer_ends_where_a_word_ends(response: str) -> None:
    assert starts_with(response, ("Lima",)) is RESPONSES[response]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (" Washington D.C.", "Washington D.C."),
        ("São Tomé!", "São Tomé"),
        ("C++ it is", "C++"),
        ("Lima", " Lima "),
        ("東京 です", "東京"),
    ],
)
def test_answers_are_taken_literally_and_without_the_spaces_around(
    response: str, answer: str
) -> None:
    assert starts_with(response, (answer,))
    assert not starts_with("Washington DxCx", ("Washington D.C.",))


def test_any_of_several_answers_counts() -> None:
    assert starts_with("Kyiv", ("Kiev", "Kyiv"))


def stimulus(name: str, **answers: tuple[str, ...]) -> Stimulus:
    return Stimulus(name, "target", prompt="?", answers=answers or None)


STIMULI = (
    stimulus("a", memory=("Lima",), context=("Quito",)),
    stimulus("b", memory=("Rome",)),
    stimulus("c", context=("Oslo",)),
    stimulus("d"),
)


def observed(*responses: str) -> Observed:
    return Observed(STIMULI, responses, np.empty(0))


def test_the_rate_is_over_the_prompts_that_have_such_an_answer() -> None:
    seen = observed("Lima", "Oslo", "Oslo", "Rome")
    assert AnswerRate("memory").score(seen) == 0.5
    assert AnswerRate("context").score(seen) == 0.5
    assert AnswerRate("memory").score(observed("Lima", "Rome", "", "")) == 1


def test_a_rate_over_no_prompt_is_not_a_number() -> None:
    assert math.isnan(AnswerRate("other").score(observed("", "", "", "")))


def test_one_token_more_than_the_answer_is_generated() -> None:
    """Else "Limassol" cut after "Lima" would count."""
    assert AnswerRate("memory").new_tokens(3) == 4
