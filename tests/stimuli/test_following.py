"""One rule says how an answer goes on from its prompt: in text, and in tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from surgery.stimuli.answers import following, joined, spaced
from surgery.stimuli.prompts import Tokenizer

WORDS = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, " ": 4, " a": 5, "bb": 6}


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("A:", "Lima", " Lima"),
        ("A: ", "Lima", "Lima"),
        ("A:\n", "Lima", "Lima"),
        ("A:", " Lima", " Lima"),
        ("首都是", "东京", "东京"),
        ("A:", "Tōkyō 東京", " Tōkyō 東京"),
        ("", "Lima", " Lima"),
    ],
)
def test_an_answer_follows_after_a_space_where_its_script_has_any(
    prompt: str, answer: str, text: str
) -> None:
    assert spaced(prompt, answer) == text


def tokenizer_of(folder: Path, template: str) -> Tokenizer:
    """A space and the `a` after it are one token, and so is `bb`."""
    fast = Fast(BPE(WORDS, [(" ", "a"), ("b", "b")]))
    fast.add_special_tokens(["<s>", "</s>"])
    ends = [("<s>", 0), ("</s>", 1)]
    fast.post_processor = TemplateProcessing(single=template, special_tokens=ends)
    fast.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.mark.parametrize(
    ("prompt", "answer", "before", "after", "goes_on"),
    [
        ("b", "ab", (0, 3), (5, 3), True),
        ("b ", "b", (0, 3, 4), (3,), True),
        ("b ", "a", (0, 3), (5,), False),
    ],
)
def test_a_model_goes_on_where_the_tokens_of_the_prompt_stay(
    prompt: str,
    answer: str,
    before: tuple[int, ...],
    after: tuple[int, ...],
    goes_on: bool,
    tmp_path: Path,
) -> None:
    """A token that reaches across belongs to the answer, and no model run on the prompt says it."""
    tokenizer = tokenizer_of(tmp_path, "<s> $A")
    assert joined(tokenizer, prompt, answer) == (before, after)
    assert following(tokenizer, prompt, answer) == (after if goes_on else None)


def test_nothing_goes_on_from_a_prompt_that_is_run_with_its_end(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, "<s> $A </s>")
    assert joined(tokenizer, "b", "a") == ((0, 3), (5,))
    assert following(tokenizer, "b", "a") is None


def test_an_answer_without_tokens_is_none(tmp_path: Path) -> None:
    """What a tokenizer does not know it may leave out."""
    tokenizer = tokenizer_of(tmp_path, "<s> $A")
    assert following(tokenizer, "b\n", "x") is None
