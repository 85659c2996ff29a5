"""What exporters and runtimes do to numbers by themselves, seen by the whole differential test."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from corners import VOCAB
from differential import mutants
from differential.lab import Lab, found
from models import make
from onnx import ModelProto
from recipes import apply_edits
from safetensors.numpy import load_file, save_file

from surgery.runtimes import child

Plant = Callable[..., Path]

DOWN = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]


def share(model: ModelProto, kept: str, other: str) -> None:
    """One initializer for two tensors, as exporters make of equal ones."""
    names = [t.name for t in model.graph.initializer if t.name in (kept, f"{kept}.T")]
    [dropped] = [t for t in model.graph.initializer if t.name in (other, f"{other}.T")]
    for node in model.graph.node:
        node.input[:] = [names[0] if name == dropped.name else name for name in node.input]
    model.graph.initializer.remove(dropped)


def test_one_initializer_of_two_equal_tensors_passes_and_of_two_unlike_ones_fails(
    lab: Lab, plant: Plant, tmp_path: Path
) -> None:
    """Without their MLPs both layers write zeros, so that one initializer is enough."""
    case = lab.case("llama")
    silent = {"op": "layers", "layers": "all", "factor": 0.0, "part": "mlp"}
    edited = apply_edits(tmp_path, case.model, [silent])
    shared = plant(
        lab.exporter.export(edited, tmp_path / "onnx"), partial(share, kept=DOWN[0], other=DOWN[1])
    )
    pair = {"edited": edited, "edited_onnx": shared}
    assert lab.diff(case, **pair).verdict == "pass"
    wrong = lab.diff(case, onnx=plant(case.onnx, partial(share, kept=DOWN[0], other=DOWN[1])))
    assert ("conversion", "wrong value") in found(wrong)


def test_a_number_that_float16_cannot_hold_is_not_clamped_unseen(
    lab: Lab, plant: Plant, tmp_path: Path
) -> None:
    """Converters to float16 make 65504 of a million, and say nothing."""
    model, name = make("llama", tmp_path / "model", vocab_size=VOCAB), "model.embed_tokens.weight"
    tensors = load_file(model / "model.safetensors")
    tensors[name][50, 3] = 1e6
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    onnx = lab.exporter.export(model, tmp_path / "onnx")
    clamp = partial(mutants.change, name=name, how=lambda values: np.clip(values, -65504, 65504))
    with lab.here.installed():
        from surgery import pipeline

        report = pipeline.diff(model, onnx=plant(onnx, clamp))
    rows = [f for f in report.findings if f.stage == "embedding"]
    assert [(f.site, f.value) for f in rows] == [("R_o/token 50", 1e6 - 65504)]
    assert f"R_o/{name}" in {f.site for f in report.findings if f.stage == "lineage"}


def test_the_verdict_does_not_depend_on_the_number_of_threads(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in another order differ in their last bits, which noise allows for."""
    import torch

    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            monkeypatch.setattr(child, "default_threads", lambda threads=threads: threads)
            report = lab.diff(lab.case("llama"))
            assert (report.verdict, list(report.findings)) == ("pass", [])
    finally:
        torch.set_num_threads(before)


def test_a_tie_that_the_edit_broke_and_the_conversion_did_not_is_named(
    lab: Lab, tmp_path: Path
) -> None:
    """The head has a copy of its own now; the file still multiplies by the embedding."""
    case = lab.case("gpt2")
    edit = {"op": "lm_head_spectrum", "components": [0], "factor": 0.1}
    edited = apply_edits(tmp_path, case.model, [edit], untie=True)
    good = lab.exporter.export(edited, tmp_path / "onnx")
    assert lab.diff(case, edited=edited, edited_onnx=good).verdict == "pass"
    report = lab.diff(case, edited=edited, edited_onnx=case.onnx)
    assert report.verdict == "fail"
    assert "R_e/lm_head.weight" in {f.site for f in report.findings if f.stage == "lineage"}
    assert ("interaction", "the edit was lost") in found(report)
