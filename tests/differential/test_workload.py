"""What the corners are asked: chosen, cut and named before anything runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from evidences import clean, report

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.differential import Workload, make_workload
from surgery.export import choose_task
from surgery.policy import BUILT_IN
from surgery.report import Report, render
from surgery.stimuli import afford
from surgery.stimuli.text import NAME as TEXT

FIXTURE = Path(__file__).resolve().parents[2] / "fixtures" / "polyglot-llama"


def workload(model: Path, task: str = "causal-lm", seed: int = 0) -> Workload:
    base = Checkpoint.open(model)
    return make_workload(base, identify(base), choose_task(model, task), (), BUILT_IN, seed)


def told(own: Workload) -> Report:
    """A report whose inputs describe `own`."""
    return report(clean()).model_copy(update={"inputs": {"workload": own.describe()}})


def test_a_small_model_is_asked_everything(base_of: Callable[..., Path]) -> None:
    own = workload(base_of("gpt2"))
    assert not own.left_out
    assert "Left out" not in render(told(own), "text")


def test_what_a_large_model_is_not_asked_is_in_the_report(
    base_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base_of("gpt2", n_positions=2048)
    every = workload(model)
    monkeypatch.setattr(afford, "PROBE_FLOPS", 1.0)
    less = workload(model)
    assert sum(batch.input_ids.size for batch in less.batches) <= afford.LEAST_POSITIONS
    dropped = {b.name for b in every.batches} - {b.name for b in less.batches}
    assert dropped == set(less.left_out)
    for format in ("text", "md", "html"):
        shown = render(told(less), format)
        assert all(name in shown for name in dropped)


def test_real_text_is_asked_where_there_is_a_tokenizer(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """One that is not the model's stops nothing, and is told."""
    model = tmp_path / "model"
    shutil.copytree(base_of("gpt2"), model)
    assert TEXT not in {batch.name for batch in workload(model).batches}
    (model / "tokenizer.json").write_text("{}")
    own = workload(model)
    assert "not a tokenizer" in own.left_out[TEXT] and TEXT in render(told(own), "text")
    shutil.copy(FIXTURE / "tokenizer.json", model)
    assert "for plain text" in workload(model).left_out[TEXT], "2,400 tokens for a model of 101"
    assert TEXT in {batch.name for batch in workload(FIXTURE).batches}
