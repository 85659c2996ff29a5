"""A batch as one run: what it is fed and must give, at once and over PyTorch's caches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from surgery.errors import EnvironmentFault
from surgery.repro.caches import after, fed, real
from surgery.runtimes import RUNTIMES, ModelRef
from surgery.stimuli import Batch
from surgery.stimuli.batches import cache_batches, drawn, mask_of
from tests.localize.conftest import Bases

ROWS, LENGTH, HEADS = 3, 6, 6
"""As many heads as positions, so that one is not taken for the other."""


@pytest.fixture
def batch() -> Batch:
    mask = mask_of(ROWS, LENGTH, "left")
    return replace(drawn("a batch", mask, 50, np.random.default_rng(0)), split=4)


@pytest.fixture
def torch() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    shapes = {
        "present.0.key": (ROWS, HEADS, LENGTH, 2),
        "logits": (ROWS, LENGTH, 7),
        "a table": (LENGTH, 5),
    }
    return {n: generator.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def test_a_split_batch_runs_on_over_the_caches_of_what_is_before(
    batch: Batch, torch: dict[str, np.ndarray]
) -> None:
    inputs, values = fed(batch, torch), after(batch, torch)
    assert (inputs["input_ids"] == batch.input_ids[:, 4:]).all()
    assert (inputs["position_ids"] == batch.position_ids[:, 4:]).all()
    assert (inputs["attention_mask"] == batch.attention_mask).all()
    assert (inputs["present.0.key"] == torch["present.0.key"][:, :, :4]).all()
    assert (values["logits"] == torch["logits"][:, 4:]).all()
    assert (values["present.0.key"] == torch["present.0.key"]).all()
    assert "a table" not in values


def test_without_a_split_everything_runs_at_once(
    batch: Batch, torch: dict[str, np.ndarray]
) -> None:
    whole = replace(batch, split=0)
    inputs, values = fed(whole, torch), after(whole, torch)
    assert inputs["input_ids"].shape == (ROWS, LENGTH)
    assert inputs["present.0.key"].shape == (ROWS, HEADS, 0, 2)
    assert values.keys() == torch.keys()
    assert all((values[name] == torch[name]).all() for name in torch)


@pytest.mark.parametrize("split", [0, 4])
def test_real_positions_are_those_of_the_mask(
    batch: Batch, torch: dict[str, np.ndarray], split: int
) -> None:
    run = replace(batch, split=split)
    inputs, values = fed(run, torch), after(run, torch)
    cache = real("present.0.key", values["present.0.key"], inputs)
    rows = real("logits", values["logits"], inputs)
    for row, column in np.ndindex(ROWS, LENGTH):
        token = bool(batch.attention_mask[row, column])
        assert (cache[row, :, column] == token).all() and cache.shape == (ROWS, HEADS, LENGTH)
        if column >= split:
            assert rows[row, column - split] == token
    assert real("a table", torch["a table"], inputs).all()


def test_a_cache_of_a_window_is_not_run_over(batch: Batch, torch: dict[str, np.ndarray]) -> None:
    window = {**torch, "present.0.key": torch["present.0.key"][:, :, 2:]}
    with pytest.raises(EnvironmentFault, match=r"keeps 4 of 6 positions in present\.0\.key"):
        fed(batch, window)
    assert fed(replace(batch, split=0), window)["input_ids"].shape == (ROWS, LENGTH)


def test_the_caches_are_those_that_pytorch_leaves_of_the_first_part(bases: Bases) -> None:
    base = bases("llama with cache")
    runtime = RUNTIMES["torch"](ModelRef("torch", base.model, base.task.name), 1)
    for batch in cache_batches(200, 32, seed=3):
        columns = slice(0, batch.split)
        parts = {name: array[:, columns] for name, array in batch.inputs().items()}
        mask = batch.attention_mask[:, columns] == 1
        own, inputs = runtime.infer(parts), fed(batch, runtime.infer(batch.inputs()))
        for name in own.keys() & inputs.keys():
            pair = (array.swapaxes(1, 2)[mask] for array in (inputs[name], own[name]))
            np.testing.assert_allclose(*pair, rtol=0, atol=1e-5)
        assert own.keys() & inputs.keys() == own.keys() - {"logits"}
