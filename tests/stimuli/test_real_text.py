"""Real text in the model's own tokens, where it has any."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from surgery.errors import StimuliError
from surgery.stimuli.batches import digest
from surgery.stimuli.prompts import TOKENIZER, Tokenizer
from surgery.stimuli.text import TOKENS, text_batch

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
MODEL, VOCAB = FIXTURES / "polyglot-llama", 2400
WORDS = FIXTURES / "capitals-gpt2"


def test_it_is_text_in_one_row_and_follows_the_seed() -> None:
    batch = text_batch(MODEL, VOCAB, 128, seed=0)
    assert batch is not None
    assert batch.input_ids.shape == (1, TOKENS) and batch.attention_mask.all()
    assert len(set(batch.input_ids[0].tolist())) > 10
    assert Tokenizer(MODEL).decode(batch.input_ids[0].tolist()).strip()
    others = [text_batch(MODEL, VOCAB, 128, seed) for seed in (0, 1)]
    assert [digest([other]) == digest([batch]) for other in others if other] == [True, False]


def test_it_fits_the_model() -> None:
    batch = text_batch(MODEL, VOCAB, 5, seed=0)
    assert batch is not None and batch.input_ids.shape == (1, 5)


def test_without_a_tokenizer_there_is_none(tmp_path: Path) -> None:
    assert text_batch(tmp_path, VOCAB, 128, seed=0) is None


def test_of_words_that_are_all_unknown_there_is_none() -> None:
    assert text_batch(WORDS, VOCAB, 128, seed=0) is None


def test_a_tokenizer_of_another_model_is_told(tmp_path: Path) -> None:
    shutil.copy(MODEL / TOKENIZER, tmp_path)
    with pytest.raises(StimuliError, match="this model takes 0 to 2"):
        text_batch(tmp_path, 3, 128, seed=0)
