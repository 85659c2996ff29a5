"""Where what follows a prompt begins, in tokens: merges across the border, special tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from surgery.stimuli.prompts import Tokenizer

WORDS = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "bc": 5, " ": 6, "ab": 7}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """`bc` is one token, and `ab` where no `c` comes; texts are `<s> … </s>`."""
    fast = Fast(BPE(WORDS, [("b", "c"), ("a", "b")]))
    fast.add_special_tokens(["<s>", "</s>"])
    ends = [("<s>", 0), ("</s>", 1)]
    fast.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    fast.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "following", "expected"),
    [
        ("ab", " a", ((0, 7), (6, 2))),
        ("ab", "c", ((0,), (2, 5))),
        ("a", "c", ((0, 2), (4,))),
        ("cb", "c", ((0, 4), (5,))),
        ("a</s>", "c", ((0, 2, 1), (4,))),
        ("a", "", ((0, 2), ())),
    ],
)
def test_it_begins_at_the_first_token_that_the_prompt_has_not(
    tokenizer: Tokenizer,
    prompt: str,
    following: str,
    expected: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    """A special token at the end ends no text that goes on; one that was written stays."""
    assert tokenizer.split(prompt, following) == expected


def test_text_that_follows_has_no_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("ab") == (0, 7, 1)
    assert tokenizer.encode_alone("ab") == (7,)
