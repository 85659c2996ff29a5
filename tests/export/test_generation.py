"""Greedy decoding over the graph's own cache gives the tokens that transformers' generate gives."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from surgery.export import CACHED, LAYOUTS, TASKS, export
from surgery.export.load import load_model
from surgery.runtimes.generate import left_padded
from tests.exports import CAUSAL, PROVED, WINDOWED, WITH_CACHE
from tests.here import in_this_process
from tests.models import Zoo

NEW = 32
MARGIN = 2e-5
"""How far the best logit must lie above the second at every step: some twenty times the noise of
the small random models. It holds with the seed they have, so no tie is decided by rounding."""
FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
Ids = NDArray[np.int64]


def prompts(vocabulary: int) -> list[list[int]]:
    """Of unlike lengths, one of a single token."""
    generator = np.random.default_rng(7)
    return [list(map(int, generator.integers(3, vocabulary, size))) for size in (11, 1, 6)]


def decode(path: Path, texts: list[list[int]]) -> tuple[Ids, float]:
    """`NEW` tokens for each text, one step at a time over what the step before left, and the
    least margin of the best logit over the second."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    ports = {value.name: value for value in session.get_inputs()}
    feed = dict(left_padded(texts))
    mask, caches = feed["attention_mask"], [name for name in ports if "past" in name]
    rows = len(texts)
    for name in caches:
        feed[name] = np.zeros((rows, ports[name].shape[1], 0, ports[name].shape[3]), np.float32)
    found, margins = [], []
    for _ in range(NEW):
        given = {name: array for name, array in feed.items() if name in ports}
        outputs = dict(zip(names, session.run(None, given), strict=True))
        last = outputs["logits"][:, -1]
        second, best = np.sort(last, axis=1)[:, -2:].T
        margins.append(float((best - second).min()))
        token = last.argmax(axis=1)[:, None]
        found.append(token)
        mask = np.concatenate([mask, np.ones_like(token)], axis=1)
        positions = mask.sum(axis=1, keepdims=True) - 1
        feed = {"input_ids": token, "attention_mask": mask, "position_ids": positions}
        feed |= {name: outputs[name.replace("past_key_values", "present")] for name in caches}
    return np.concatenate(found, axis=1), min(margins)


def generated(model_dir: Path, texts: list[list[int]]) -> Ids:
    """The same of transformers, which is told of no end."""
    import torch

    model = load_model(model_dir, TASKS[CACHED], "float32")
    model.generation_config.eos_token_id = None
    batch = {name: torch.from_numpy(array) for name, array in left_padded(texts).items()}
    batch.pop("position_ids")
    found = model.generate(**batch, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    tokens: Ids = found[:, batch["input_ids"].shape[1] :].numpy()
    return tokens


def assert_same_tokens(model_dir: Path, path: Path, texts: list[list[int]]) -> None:
    tokens, margin = decode(path, texts)
    assert margin > MARGIN
    np.testing.assert_array_equal(tokens, generated(model_dir, texts))
    assert len(np.unique(tokens)) >= 6, "not one token for ever"


LOUD = 4.0
"""Factor of the layers' matrices: as they are, models with tied embeddings say the last token of
the prompt again and again, whatever is in the cache."""


def loud(zoo: Zoo, model: str, folder: Path, **fields: Any) -> Path:
    """A copy of a random model whose layers count for more; its config, and graph, is the same."""
    shutil.copytree(zoo.checkpoint(model, **fields), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, array in tensors.items():
        if array.ndim > 1 and re.search(r"\.\d\.", name):
            tensors[name] = LOUD * array
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def check(zoo: Zoo, model: str, folder: Path, layout: str = "linked", **fields: Any) -> None:
    source = loud(zoo, model, folder / "model", **fields)
    output = folder / "onnx" if layout == "portable" else None
    with in_this_process():
        result = export(source, output, task=CACHED, layout=layout)
    assert_same_tokens(source, result.model, prompts(101))


@pytest.mark.parametrize("family", PROVED[WITH_CACHE])
def test_every_family_decodes_as_transformers_does(zoo: Zoo, tmp_path: Path, family: str) -> None:
    check(zoo, family, tmp_path)


@pytest.mark.campaign
@pytest.mark.parametrize("model", CAUSAL)
def test_every_variant_does_in_either_layout(zoo: Zoo, tmp_path: Path, model: str) -> None:
    for layout in LAYOUTS:
        check(zoo, model, tmp_path / layout, layout)


def test_past_the_end_of_a_sliding_window(zoo: Zoo, tmp_path: Path) -> None:
    """One layer of two has a window."""
    check(zoo, "gemma2", tmp_path, **WINDOWED["gemma2"])


@pytest.mark.campaign
@pytest.mark.parametrize("model", WINDOWED)
def test_past_the_end_of_any_familys_sliding_window(zoo: Zoo, tmp_path: Path, model: str) -> None:
    check(zoo, model, tmp_path, **WINDOWED[model])


def test_the_window_matters(zoo: Zoo) -> None:
    """Without it other tokens come: the test above would see it ignored."""
    narrow = zoo.onnx("gemma2", CACHED, layout="linked", **WINDOWED["gemma2"])
    wide = zoo.onnx("gemma2", CACHED, layout="linked")
    assert (decode(narrow, prompts(101))[0] != decode(wide, prompts(101))[0]).any()


def questions(fixture: Path) -> list[list[int]]:
    """Three prompts of unlike length that the model is tested with."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(fixture / "tokenizer.json"))
    lines = (fixture / "stimuli" / "target.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [tokenizer.encode(json.loads(line)["prompt"]).ids for line in lines]
    by_length = {len(text): text for text in texts}
    lengths = sorted(by_length)
    return [by_length[n] for n in (lengths[0], lengths[-1], lengths[len(lengths) // 2])]


@pytest.mark.parametrize("name", ["capitals-gpt2", "polyglot-llama"])
def test_trained_models_decode_as_transformers_does(name: str, tmp_path: Path) -> None:
    fixture = FIXTURES / name
    with in_this_process():
        result = export(fixture, tmp_path / "onnx", task=CACHED)
    assert_same_tokens(fixture, result.model, questions(fixture))
