"""Stimuli files: every bad line is refused by file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from surgery.errors import StimuliError
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import Tokenizer, load_stimuli, tokens_of

GOOD = {"id": "a", "set": "target", "prompt": "hello", "answers": {"memory": ["Lima"]}}
IDS = {"id": "b", "set": "preserve", "input_ids": [1, 2, 3]}


def write(path: Path, *lines: Any) -> Path:
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    return path


def test_lines_come_in_order_over_all_files(tmp_path: Path) -> None:
    one = write(tmp_path / "1.jsonl", GOOD, "", IDS)
    two = write(tmp_path / "2.jsonl", {**IDS, "id": "c"})
    found = load_stimuli([one, two])
    assert [stimulus.id for stimulus in found] == ["a", "b", "c"]
    assert found[0] == Stimulus("a", "target", "hello", None, {"memory": ("Lima",)})
    assert found[1].input_ids == (1, 2, 3)


def test_a_prompt_may_have_a_corrupted_twin(tmp_path: Path) -> None:
    [found] = load_stimuli([write(tmp_path / "1.jsonl", {**GOOD, "corrupted": "jello"})])
    assert (found.prompt, found.corrupted) == ("hello", "jello")


@pytest.mark.parametrize("text", ["", "\n", " \n\n"])
def test_a_file_without_stimuli_is_refused(tmp_path: Path, text: str) -> None:
    """Its user believes that something of theirs was tested."""
    full, empty = write(tmp_path / "full.jsonl", GOOD), tmp_path / "empty.jsonl"
    empty.write_text(text)
    with pytest.raises(StimuliError, match=r"empty\.jsonl: holds no stimuli"):
        load_stimuli([full, empty])


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "line 2"),
    "no object": ("[1]", "line 2"),
    "unknown set": ({**IDS, "set": "targt"}, "set"),
    "unknown field": ({**IDS, "promt": "x"}, "promt"),
    "no id": ({"set": "target", "prompt": "x"}, "id"),
    "empty id": ({**IDS, "id": ""}, "id"),
    "both inputs": ({**IDS, "prompt": "x"}, "either prompt or input_ids"),
    "no input": ({"id": "b", "set": "probe"}, "either prompt or input_ids"),
    "empty prompt": ({**GOOD, "id": "b", "prompt": ""}, "prompt"),
    "no tokens": ({**IDS, "input_ids": []}, "input_ids"),
    "negative token": ({**IDS, "input_ids": [1, -1]}, "input_ids"),
    "token as text": ({**IDS, "input_ids": ["1"]}, "input_ids"),
    "fraction of a token": ({**IDS, "input_ids": [1.5]}, "input_ids"),
    "no answers of a name": ({**IDS, "answers": {"memory": []}}, "answers.memory"),
    "empty answer": ({**IDS, "answers": {"memory": ["Lima", " "]}}, "answers.memory"),
    "empty corrupted prompt": ({**GOOD, "id": "b", "corrupted": ""}, "corrupted"),
    "huge corrupted prompt": ({**GOOD, "id": "b", "corrupted": "x" * ((1 << 18) + 1)}, "corrupted"),
    "corrupted token ids": ({**IDS, "corrupted": "x"}, "corrupted goes with prompt"),
    "the same id again": ({**IDS, "id": "a"}, "comes twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_refused_with_file_line_and_field(tmp_path: Path, name: str) -> None:
    line, field = BAD[name]
    path = write(tmp_path / "bad.jsonl", GOOD, line)
    with pytest.raises(StimuliError) as caught:
        load_stimuli([path])
    assert str(path) in str(caught.value)
    assert "line 2" in str(caught.value)
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_may_not_come_twice_in_a_line(tmp_path: Path) -> None:
    line = '{"id": "b", "id": "c", "set": "probe", "prompt": "x"}'
    with pytest.raises(StimuliError, match="duplicate key 'id'"):
        load_stimuli([write(tmp_path / "bad.jsonl", line)])


def test_an_id_may_not_come_again_in_another_file(tmp_path: Path) -> None:
    files = [write(tmp_path / name, IDS) for name in ("1.jsonl", "2.jsonl")]
    with pytest.raises(StimuliError, match="comes twice"):
        load_stimuli(files)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StimuliError, match=r"none\.jsonl"):
        load_stimuli([tmp_path / "none.jsonl"])


# --------------------------------------------------------------------------------------- tokens


def given(*ids: int) -> list[Stimulus]:
    return [Stimulus("a", "target", input_ids=ids)]


def test_tokens_at_both_ends_of_the_range_are_taken() -> None:
    assert tokens_of(given(0, 9), None, vocab=10, positions=2) == {"a": (0, 9)}


def test_a_token_out_of_range_is_refused_with_the_range() -> None:
    with pytest.raises(StimuliError, match="token id 10 is out of range 0 to 9"):
        tokens_of(given(0, 10), None, vocab=10, positions=2)


def test_a_prompt_too_long_for_the_model_is_refused_with_the_limit() -> None:
    with pytest.raises(StimuliError, match="has 3 tokens; this model takes 1 to 2"):
        tokens_of(given(1, 2, 3), None, vocab=10, positions=2)


def test_a_prompt_without_a_tokenizer_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(StimuliError, match=r"has no tokenizer\.json; give input_ids"):
        Tokenizer(tmp_path)
    with pytest.raises(StimuliError, match=r"needs a tokenizer\.json"):
        tokens_of([Stimulus("a", "target", prompt="x")], None, 10, 10)


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(StimuliError, match="not a tokenizer"):
        Tokenizer(tmp_path)


@pytest.fixture
def words(tmp_path: Path) -> Tokenizer:
    """A tokenizer of whole words that asks for padding and truncation, as saved ones may."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"one": 1, "two": 2, "[EOS]": 3}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.add_special_tokens(["[EOS]"])
    fast.enable_padding(length=8)
    fast.enable_truncation(1)
    fast.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(tmp_path)


def test_prompts_are_neither_padded_nor_truncated(words: Tokenizer) -> None:
    stimuli = [Stimulus("a", "target", prompt="one two one")]
    assert tokens_of(stimuli, words, vocab=4, positions=8) == {"a": (1, 2, 1)}


def test_special_tokens_are_left_out_of_responses(words: Tokenizer) -> None:
    assert words.decode((1, 2, 3)) == "one two"
