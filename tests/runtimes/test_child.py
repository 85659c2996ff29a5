"""Whatever a model does in its child, the parent gets one outcome (hazards 18, 19, 21 to 23)."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from surgery.checkpoint import Checkpoint
from surgery.errors import EnvironmentFault, OnnxError
from surgery.runtimes import RUNTIMES, ModelRef
from surgery.runtimes.child import Generation, Job, Limits, Outcome, run
from surgery.runtimes.forced import Continuation
from surgery.runtimes.worker import count_nonfinite, padding
from surgery.stimuli.interface import Batch
from tests.batches import BATCHES
from tests.models import Zoo
from tests.onnx_files import ROWS, TABLE, endless, enormous, lookup, model, save

MINUTE = Limits(60.0)


def small_batch(mask: list[list[int]] | None = None) -> Batch:
    kept = np.array(mask or [[1, 1, 1], [1, 1, 1]])
    ids = np.arange(kept.size).reshape(kept.shape)
    positions = np.maximum(kept.cumsum(axis=1) - 1, 0)
    rows = tuple(map(str, range(len(kept))))
    return Batch("b", "probe", ids, kept, positions, np.argwhere(kept == 1)[:2], rows)


def run_onnx(path: Path, scratch: Path, limits: Limits = MINUTE, **fields: object) -> Outcome:
    scratch.mkdir(exist_ok=True)
    options = {"batches": (small_batch(),), **fields}
    ref = ModelRef("onnxruntime", path, "causal-lm")
    return run(Job(ref, scratch, **options), limits)  # type: ignore[arg-type]


def test_outputs_come_back_at_the_selected_positions_alone(tmp_path: Path) -> None:
    path = save(lookup(), tmp_path / "m.onnx")
    outcome = run_onnx(path, tmp_path / "s", embedding_rows=ROWS, embedding_chunk=4, threads=1)
    assert (outcome.status, outcome.detail, outcome.threads) == ("ok", "", 1)
    assert outcome.seconds > 0
    assert outcome.peak_bytes > 1 << 20
    batch = small_batch()
    rows = batch.input_ids[batch.selected[:, 0], batch.selected[:, 1]]
    kept = outcome.outputs("b")
    assert kept.dtype == np.float32
    np.testing.assert_array_equal(kept, TABLE[rows])
    np.testing.assert_array_equal(outcome.embedding(), TABLE)
    fact = outcome.facts("b").outputs[0]
    assert (fact.name, fact.dtype, fact.shape) == ("logits", "float32", (2, 3, 4))


def test_torch_onnx_and_the_reference_meet_through_their_children(zoo: Zoo, tmp_path: Path) -> None:
    source, onnx_file = zoo.checkpoint("gpt2"), zoo.onnx("gpt2", "causal-lm")
    prompts = ((5, 6, 7), (8,), (9, 10))
    request = Generation(prompts, 6, (2,))
    asked = (Continuation((5, 6, 7), (8, 9)), Continuation((8,), (10,)))
    refs = {
        "single": ModelRef("torch", source, "causal-lm"),
        "double": ModelRef("torch", source, "causal-lm", "float64"),
        "onnx": ModelRef("onnxruntime", onnx_file, "causal-lm"),
    }
    found = {}
    for name, ref in refs.items():
        (tmp_path / name).mkdir()
        job = Job(ref, tmp_path / name, BATCHES, embedding_rows=101, generations=(request,))
        found[name] = run(replace(job, continuations=asked), MINUTE)
        assert found[name].status == "ok", found[name].detail
    table = Checkpoint.open(source).read("transformer.wte.weight")
    for batch in BATCHES:
        exact = found["double"].outputs(batch.name)
        assert exact.dtype == np.float64
        assert exact.shape == (len(batch.selected), 101)
        for name in ("single", "onnx"):
            assert 0 < np.abs(found[name].outputs(batch.name) - exact).max() < 5e-6
    for outcome in found.values():
        np.testing.assert_array_equal(outcome.embedding(), table)
        forced, exactly = (o.continuations() for o in (outcome, found["double"]))
        assert [len(row) for row in forced] == [2, 1]
        np.testing.assert_allclose(sum(forced, ()), sum(exactly, ()), atol=5e-6)
        made, expected = (o.generations()[0] for o in (outcome, found["single"]))
        assert (made.tokens, made.nonfinite) == (expected.tokens, expected.nonfinite)
        for runners, others in zip(made.runners, expected.runners, strict=True):
            np.testing.assert_allclose(runners, others, rtol=1e-4, atol=1e-6)
    assert found["single"].generations()[0].tokens == one_by_one(refs["single"], request)


def one_by_one(ref: ModelRef, request: Generation) -> tuple[tuple[int, ...], ...]:
    """Greedy decoding of each prompt alone, without padding."""
    runtime = RUNTIMES[ref.runtime](ref, 1)
    texts = []
    for prompt in request.prompts:
        text = list(prompt)
        while len(text) < len(prompt) + request.max_new_tokens:
            ids = np.array([text])
            inputs = {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "position_ids": np.arange(len(text))[None],
            }
            text.append(int(runtime.infer(inputs)["logits"][0, -1].argmax()))
            if text[-1] in request.eos:
                break
        texts.append(tuple(text[len(prompt) :]))
    return tuple(texts)


def test_generation_stops_at_an_end_token_and_takes_the_first_of_equals(tmp_path: Path) -> None:
    following = np.zeros((ROWS, ROWS), np.float32)
    following[np.arange(ROWS), (np.arange(ROWS) + 1) % ROWS] = 1
    following[5] = 1  # a tie of all tokens
    path = save(lookup(table=following), tmp_path / "m.onnx")
    request = Generation(((1,), (9, 3), (4,)), 4, (4,))
    asked = (Continuation((9, 1), (2, 2)), Continuation((5,), (7,)))
    given = {"generations": (request,), "continuations": asked}
    outcome = run_onnx(path, tmp_path / "s", batches=(), **given)
    made = outcome.generations()[0]
    assert made.tokens == ((2, 3, 4), (4,), (5, 0, 1, 2))
    # All others are equal, so the first of them is the runner-up; after token 5 it is token 1.
    assert made.runners[0] == ((0, 1.0, 1.0), (0, 1.0, 1.0), (0, 1.0, 1.0))
    assert made.runners[2][1] == (1, 0.0, 1.0)
    # One logit of 1 and the others 0; after token 5 all are 1.
    total = np.log(np.e + ROWS - 1)
    assert outcome.continuations()[0] == pytest.approx((1 - total, -total))
    assert outcome.continuations()[1] == pytest.approx((-np.log(ROWS),))


def test_an_infinite_loop_is_killed_at_the_time_limit(tmp_path: Path) -> None:
    outcome = run_onnx(save(endless(), tmp_path / "m.onnx"), tmp_path / "s", Limits(4.0))
    assert outcome.status == "timeout"
    assert "4 s" in outcome.detail
    assert outcome.seconds < 15
    with pytest.raises(EnvironmentFault, match="timeout"):
        outcome.outputs("b")


def test_an_allocation_of_4_tib_fails_in_the_child_alone(tmp_path: Path) -> None:
    outcome = run_onnx(save(enormous(), tmp_path / "m.onnx"), tmp_path / "s")
    assert outcome.status in ("error", "crash")
    assert outcome.kind == ""
    assert outcome.peak_bytes < 1 << 30


def test_a_native_crash_of_a_runtime_is_recorded(tmp_path: Path) -> None:
    """The signal arrives while the native code runs, as from a fault of its own."""

    def crash() -> None:
        while not (child := find_child(tmp_path / "s")):
            time.sleep(0.02)
        time.sleep(0.3)
        os.kill(child, signal.SIGSEGV)

    killer = threading.Thread(target=crash)
    killer.start()
    outcome = run_onnx(save(endless(), tmp_path / "m.onnx"), tmp_path / "s")
    killer.join()
    assert (outcome.status, outcome.detail) == ("crash", "killed by SIGSEGV")


def find_child(scratch: Path) -> int:
    mark = str(scratch / "job.json").encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "cmdline").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            continue
    return 0


def test_a_bad_file_is_bad_input_not_a_finding(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"garbage")
    outcome = run_onnx(tmp_path / "m.onnx", tmp_path / "s")
    assert (outcome.status, outcome.kind) == ("error", "input")
    with pytest.raises(OnnxError, match="not an ONNX file"):
        outcome.raise_bad_input()


def test_a_failing_run_is_a_finding_not_bad_input(tmp_path: Path) -> None:
    path = save(lookup(table=TABLE[:2]), tmp_path / "m.onnx")
    outcome = run_onnx(path, tmp_path / "s")
    assert (outcome.status, outcome.kind) == ("error", "")
    assert "\n" not in outcome.detail
    outcome.raise_bad_input()


@pytest.mark.parametrize(
    ("mask", "count"), [([[1, 1, 1], [1, 1, 1]], 8), ([[1, 0, 1], [1, 1, 1]], 4)]
)
def test_values_that_are_not_finite_are_counted_at_real_positions(
    tmp_path: Path, mask: list[list[int]], count: int
) -> None:
    """Also those that are not selected; padding does not count."""
    table = TABLE.copy()
    table[1], table[4] = np.nan, np.inf
    path = save(lookup(table=table), tmp_path / "m.onnx")
    outcome = run_onnx(path, tmp_path / "s", batches=(small_batch(mask),))
    assert [fact.nonfinite for fact in outcome.facts("b").outputs] == [count]


def test_values_of_a_cache_are_counted_along_its_length() -> None:
    """Also where there are as many heads as positions."""
    cache, mask = np.zeros((2, 3, 3, 4), np.float32), np.array([[0, 1, 1], [1, 1, 1]])
    cache[0, :, 0], cache[1, 0, 2, 3] = np.nan, np.inf
    assert (count_nonfinite(cache, mask), count_nonfinite(cache, 1 - mask)) == (1, 12)


def test_a_row_of_padding_alone_is_not_counted() -> None:
    """Nothing says what a runtime gives for a row that may attend to nothing."""
    mask = np.array([[0, 1, 1], [0, 0, 0]])
    batch, pooled = np.zeros((2, 3, 4), np.float32), np.zeros((2, 5), np.float32)
    batch[1], pooled[1], batch[0, 0, 0] = np.nan, np.nan, np.nan
    assert padded_facts(batch, mask) == (0, 1)
    assert padded_facts(pooled, mask) == (0, 0)
    pooled[0, 2] = np.inf
    assert padded_facts(pooled, mask)[0] == 1


def padded_facts(array: NDArray[Any], mask: NDArray[Any]) -> tuple[int, int]:
    return count_nonfinite(array, mask), count_nonfinite(array, padding(mask))


def test_a_generation_that_meets_nan_stops_and_says_so(tmp_path: Path) -> None:
    table = np.eye(ROWS, dtype=np.float32)[:, ::-1].copy()
    table[3] = np.nan
    path = save(lookup(table=table), tmp_path / "m.onnx")
    request = Generation(((3,), (4,)), 2, ())
    found = run_onnx(path, tmp_path / "s", batches=(), generations=(request,)).generations()[0]
    assert (found.tokens, found.nonfinite) == (((), (6, 4)), 1)


def test_missing_and_misshapen_outputs_are_reported_with_what_there_is(tmp_path: Path) -> None:
    cast = helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT)
    flat = save(model([cast], ["input_ids"], "ids", [], shape=("b", "l")), tmp_path / "flat.onnx")
    outcome = run_onnx(flat, tmp_path / "a", embedding_rows=3)
    assert outcome.status == "ok"
    assert outcome.facts("b").problem == "expected output logits; found 'ids'"
    assert "no Gather" in str(outcome.embedding_problem)
    with pytest.raises(EnvironmentFault, match="expected output logits"):
        outcome.outputs("b")
    turn = helper.make_node("Transpose", ["rows"], ["logits"], perm=[1, 0, 2])
    rows = helper.make_node("Gather", ["table", "input_ids"], ["rows"])
    weights = [numpy_helper.from_array(TABLE, "table")]
    turned = save(model([rows, turn], ["input_ids"], "logits", weights), tmp_path / "turned.onnx")
    problem = run_onnx(turned, tmp_path / "b").facts("b").problem
    assert problem == "expected output logits of shape [2, 3, 'n']; found [3, 2, 4]"


def test_the_number_of_threads_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(lookup(), tmp_path / "m.onnx")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert run_onnx(path, tmp_path / "a").threads == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert run_onnx(path, tmp_path / "b").threads == len(os.sched_getaffinity(0))
