"""Every family's export is the model: linked, portable, cached, in float16, of any storage type."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from surgery.export import CACHED, LAYOUTS, TASKS
from surgery.runtimes import RUNTIMES, ModelRef, Runtime
from surgery.runtimes.pytorch import TorchRuntime
from tests.batches import BATCHES
from tests.exports import ENCODERS, FAMILIES, FLOAT16, LINKED, PROVED, VARIANTS
from tests.models import MODELS, Zoo, family_of

FACTOR = 8.0
"""How many times further than float32 is from float64 a graph may be from float32."""
HALF = 2.0**-11
"""Half a unit in the last place of float16, relative."""
NARROW = ("gemma2", "bert")
"""Families that `make test` also runs in float16; the others are of the campaign."""
OFTEN = ("float32", "bfloat16")


def task_of(model: str) -> str:
    """The task whose graph does most: with a cache, where there can be one."""
    return "encoder" if family_of(model) in ENCODERS else CACHED


def torch_of(zoo: Zoo, model: str, stored: str, task: str, dtype: str = "float32") -> Runtime:
    path = zoo.checkpoint(model, stored)
    return RUNTIMES["torch"](ModelRef("torch", path, task, dtype), 1)


def onnx_of(zoo: Zoo, model: str, stored: str, task: str, **options: Any) -> Runtime:
    path = zoo.onnx(model, task, stored=stored, **options)
    return RUNTIMES["onnxruntime"](ModelRef("onnxruntime", path, task), 1)


def outputs(runtime: Runtime, split: int = 0) -> Callable[[Any], NDArray[Any]]:
    """The compared output at every real position of a batch, float64."""
    name = TASKS[runtime.model.task].output

    def run(batch: Any) -> NDArray[Any]:
        cut = min(split, batch.input_ids.shape[1] - 1)
        found = runtime.infer(batch.inputs(), cut)[name][batch.attention_mask == 1]
        return found.astype(np.float64)

    return run


def assert_is_the_model(zoo: Zoo, model: str, stored: str, task: str) -> None:
    """Both layouts, at once and in two parts over the cache: every shape unlike the traced one,
    one row, one token, padding on either side and in between, a row of nothing but padding."""
    exact = outputs(torch_of(zoo, model, stored, task, "float64"))
    single = outputs(torch_of(zoo, model, stored, task))
    graphs = {name: onnx_of(zoo, model, stored, task, layout=name) for name in LAYOUTS}
    splits = (0, 5) if TASKS[task].cache else (0,)
    for batch in BATCHES:
        expected = single(batch)
        noise = np.abs(expected - exact(batch)).max()
        assert np.isfinite(expected).all() and np.abs(expected).max() > 0.1
        assert 0 < noise < 5e-6, batch.name
        for layout, graph in graphs.items():
            for split in splits:
                apart = np.abs(outputs(graph, split)(batch) - expected).max()
                assert apart <= FACTOR * noise, (batch.name, layout, split, apart / noise)


@pytest.mark.parametrize("stored", OFTEN)
@pytest.mark.parametrize("family", PROVED[LINKED])
def test_every_familys_graph_is_the_model(zoo: Zoo, family: str, stored: str) -> None:
    assert_is_the_model(zoo, family, stored, task_of(family))


@pytest.mark.campaign
@pytest.mark.parametrize("model", MODELS)
def test_without_a_cache_in_every_storage_type(zoo: Zoo, model: str) -> None:
    task = "encoder" if family_of(model) in ENCODERS else "causal-lm"
    for stored in (*OFTEN, "float16", "float64"):
        assert_is_the_model(zoo, model, stored, task)


@pytest.mark.campaign
@pytest.mark.parametrize("model", VARIANTS)
def test_every_variants_graph_is_the_model(zoo: Zoo, model: str) -> None:
    assert_is_the_model(zoo, model, "float32", task_of(model))


def assert_close_in_float16(zoo: Zoo, model: str) -> None:
    """Numbers are rounded some ten times a layer: within eight roundings of the largest."""
    task = task_of(model)
    expected = outputs(torch_of(zoo, model, "bfloat16", task))
    for layout in LAYOUTS:
        found = outputs(onnx_of(zoo, model, "bfloat16", task, layout=layout, dtype="float16"))
        for batch in BATCHES:
            wanted = expected(batch)
            apart = np.abs(found(batch) - wanted).max()
            assert apart <= FACTOR * HALF * np.abs(wanted).max(), (batch.name, layout, apart)


@pytest.mark.parametrize("family", NARROW)
def test_float16_is_within_its_own_noise(zoo: Zoo, family: str) -> None:
    assert_close_in_float16(zoo, family)


@pytest.mark.campaign
@pytest.mark.parametrize("model", [*(f for f in PROVED[FLOAT16] if f not in NARROW), *VARIANTS])
def test_float16_is_within_its_own_noise_on_any_model(zoo: Zoo, model: str) -> None:
    assert_close_in_float16(zoo, model)


@cache
def left_padded() -> Any:
    return next(batch for batch in BATCHES if batch.name == "left")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_survives_padding_on_every_family(zoo: Zoo, family: str) -> None:
    exact = torch_of(zoo, family, "float32", task_of(family), "float64")
    for batch in BATCHES:
        found = exact.infer(batch.inputs())
        assert all(np.isfinite(a).all() for a in found.values()), (batch.name, "padding too")


@pytest.mark.parametrize("family", ["bloom", "mpt", "gemma2"])
def test_a_float32_softmax_is_what_padding_would_make_nan(
    zoo: Zoo, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest float64 is -inf there: in a padded row all are, and a later layer spreads it."""
    exact = torch_of(zoo, family, "float32", "causal-lm", "float64")
    monkeypatch.setattr(TorchRuntime, "_precision", lambda self: nullcontext())
    logits = outputs(exact)(left_padded())
    assert np.isnan(logits).any(), "real positions"
