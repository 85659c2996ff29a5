"""Streamed runtimes compute what whole ones do, with one part of the model in memory."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surgery.checkpoint import Checkpoint
from surgery.errors import InputError
from surgery.export import default_task
from surgery.runtimes import RUNTIMES, ModelRef, Runtime
from surgery.runtimes.forced import Continuation, force
from surgery.runtimes.generate import Generation, generate
from tests.batches import BATCHES
from tests.models import MODELS, Zoo

STORED = {"llama": "bfloat16", "gpt2": "float16", "bert": "bfloat16"}


def load(runtime: str, path: Path, **fields: Any) -> Runtime:
    task = fields.pop("task", default_task(path).name)
    return RUNTIMES[runtime](ModelRef(runtime, path, task, **fields), 1)


def outputs(runtime: Runtime) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{} for _ in BATCHES]

    def run(number: int) -> None:
        found[number] = runtime.infer(BATCHES[number].inputs())

    runtime.together([partial(run, number) for number in range(len(BATCHES))])
    return found


OFTEN = ("gpt2", "gptj", "bloom", "llama", "qwen3", "gemma2", "mixtral", "qwen3_moe", "bert")
"""Tied and not, float64 constants, experts joined and in dense layers' company, an encoder."""


@pytest.mark.parametrize(
    "model",
    [m if m in OFTEN else pytest.param(m, marks=pytest.mark.campaign) for m in MODELS],
)
def test_streamed_pytorch_gives_the_bits_of_the_whole_model(zoo: Zoo, model: str) -> None:
    path = zoo.checkpoint(model, STORED.get(model, "float32"))
    for dtype in ("float32", "float64"):
        whole = load("torch", path, dtype=dtype)
        streamed = load("torch-streamed", path, dtype=dtype)
        for expected, found in zip(outputs(whole), outputs(streamed), strict=True):
            assert expected.keys() == found.keys()
            for name, array in expected.items():
                np.testing.assert_array_equal(found[name], array)
        ids = np.array([100, 0, 7, 7])
        np.testing.assert_array_equal(streamed.embedding(ids), whole.embedding(ids))


def test_one_block_at_a_time_has_numbers_and_is_read_once_for_all_batches(zoo: Zoo) -> None:
    path = zoo.checkpoint("mixtral")
    streamed: Any = load("torch-streamed", path)
    held: list[set[str]] = []
    reads: list[str] = []
    fetch = streamed._numbers

    def numbers(expression: Any) -> Any:
        reads.extend(expression.tensors())
        return fetch(expression)

    def look(module: Any, args: Any, result: Any) -> None:
        named = streamed.live.named_parameters(remove_duplicate=False)
        held.append({name for name, parameter in named if not parameter.is_meta})

    streamed._numbers = numbers
    for module in streamed.live.modules():
        module.register_forward_hook(look)
    outputs(streamed)
    for names in filter(None, held):
        assert (
            names <= {"model.embed_tokens.weight"}
            or names <= {"model.norm.weight"}
            or (
                names <= {"lm_head.weight"}
                or any(all(n.startswith(f"model.layers.{i}.") for n in names) for i in (0, 1))
            )
        )
    assert set().union(*held) == set(streamed._expressions)
    assert sorted(reads) == sorted(Checkpoint.open(path).tensors)
    gc.collect()
    assert all(parameter.is_meta for parameter in streamed.live.parameters())


def test_greedy_responses_are_those_of_the_whole_model(zoo: Zoo) -> None:
    path = zoo.checkpoint("qwen3")
    prompts = tuple((5, 6, 7 + n) for n in range(10))
    requests = [Generation(prompts, 3, (2,)), Generation(prompts[:2], 5, ())]
    whole = generate(load("torch", path), requests)
    assert generate(load("torch-streamed", path), requests) == whole
    assert len(whole[0].tokens) == 10
    asked = [Continuation((5, 6, 7 + n), (8, 9)[: 1 + n % 2]) for n in range(10)]
    assert force(load("torch-streamed", path), asked) == force(load("torch", path), asked)


def test_a_parameter_without_numbers_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    source = zoo.checkpoint("llama")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj"):
        load("torch-streamed", tmp_path, task="causal-lm")
