"""A question ends where two answers part, and asks for the token that tells them apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finding import lab_of

from surgery.errors import FindError
from surgery.find.interface import Lab
from surgery.find.prompts.questions import questions_of
from surgery.find.prompts.rows import inputs_of, prompts_of
from surgery.find.scores.margins import margins, pairs_of
from surgery.stimuli import Stimulus

CAPITALS = Path(__file__).resolve().parents[2] / "fixtures" / "capitals-gpt2"
ASK = "Q: What is the capital of Peru? A:"


def lab(tmp_path: Path, *answers: Any, prompt: str = ASK, goal: str = "answer_rate:right") -> Lab:
    train = [Stimulus(f"s{n}", "target", prompt, answers=own) for n, own in enumerate(answers)]
    return lab_of(CAPITALS, train, tmp_path / "journal", goal)


def words(one: Lab, ids: Any) -> str:
    assert one.tokenizer is not None
    return one.tokenizer.decode(ids)


def test_answers_that_part_at_once_are_asked_for_right_after_the_prompt(tmp_path: Path) -> None:
    one = lab(tmp_path, {"right": ("Lima",), "wrong": ("Quito",)})
    [question] = questions_of(one, "target")
    assert [question.ids] == prompts_of(one, "target")
    assert question.other is not None
    assert words(one, [question.answer, question.other]) == "Lima Quito"


def test_what_both_answers_begin_with_is_given(tmp_path: Path) -> None:
    one = lab(tmp_path, {"right": ("San Jose",), "wrong": ("San Salvador",)})
    [question] = questions_of(one, "target")
    assert words(one, question.ids).endswith("A: San")
    assert question.other is not None
    assert words(one, [question.answer, question.other]) == "Jose Salvador"


def test_the_first_other_answer_that_differs_is_the_other(tmp_path: Path) -> None:
    one = lab(tmp_path, {"wrong": ("Lima", "Bogota"), "right": ("Lima",)})
    [question] = questions_of(one, "target")
    assert question.other is not None
    assert words(one, [question.answer, question.other]) == "Lima Bogota"


def test_prompts_whose_answers_are_the_same_are_left_out(tmp_path: Path) -> None:
    same, other = {"right": ("Lima",), "wrong": ("Lima",)}, {"wrong": ("Quito",)}
    good = {"right": ("Lima",), "wrong": ("Quito",)}
    assert len(questions_of(lab(tmp_path, same, other, good), "target")) == 1
    with pytest.raises(FindError, match="has an answer that a token tells from others"):
        questions_of(lab(tmp_path, same, other), "target")


def test_without_another_answer_the_likeliest_other_token_is_taken(tmp_path: Path) -> None:
    """Of a run of the prompt alone, beside one whose other answer is named."""
    one = lab(tmp_path, {"right": ("Quito",)}, {"right": ("Lima",), "wrong": ("Quito",)})
    questions = questions_of(one, "target")
    batch = inputs_of(one.runtime, [question.ids for question in questions])
    answers, others = pairs_of(one.live, batch, questions)
    with torch.no_grad():
        last = one.live(torch.tensor([questions[0].ids])).logits[0, -1]
    likeliest = last.argsort(descending=True)
    assert words(one, likeliest[:1].tolist()) == "Lima"
    assert words(one, answers.tolist()) == "Quito Lima"
    assert words(one, others.tolist()) == "Lima Quito"
    found = margins(one.live, batch, (answers, others))
    expected = last[answers[0]] - last[others[0]]
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("goal", ["nll", "answer_rate:wrong"])
def test_a_goal_that_names_no_answer_of_the_prompts_is_refused(goal: str, tmp_path: Path) -> None:
    with pytest.raises(FindError, match=goal):
        questions_of(lab(tmp_path, {"right": ("Lima",)}, goal=goal), "target")


def test_token_ids_in_place_of_a_prompt_are_no_question(tmp_path: Path) -> None:
    one = lab(tmp_path)
    ids = Stimulus("s", "target", input_ids=(4, 5), answers={"right": ("Lima",)})
    with pytest.raises(FindError, match="prompts as text"):
        questions_of(replace(one, train=(ids,)), "target")
