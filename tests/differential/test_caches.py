"""The key-value cache is judged too: what goes into it, what comes out, and what is made of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from corners import Case
from differential import mutants
from differential.lab import Lab, finding, found, measured
from onnx import ModelProto

from surgery.errors import InputError, OnnxError
from surgery.pipeline import pairs

Defect = Callable[[ModelProto], None]
Plant = Callable[..., Path]

TASK = "causal-lm-with-past"


@pytest.fixture(scope="session")
def case(lab: Lab) -> Case:
    return lab.case("llama", task=TASK)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_clean_graph_with_a_cache_passes_and_is_judged_with_it(lab: Lab, family: str) -> None:
    """No task is given: the graph itself says that it has a cache."""
    report = lab.diff(lab.case(family, task=TASK))
    assert (report.verdict, list(report.findings)) == ("pass", [])
    assert report.inputs["workload"]["task"] == TASK
    logits, cache = report.evidence().conversion
    assert (logits.output, cache.output[:8]) == ("logits", "present.")
    assert logits.positions == cache.positions == report.evidence().compared
    assert cache.kl is None


def test_a_clean_edit_passes_on_all_four_corners(lab: Lab, case: Case) -> None:
    report = lab.diff_edited(case)
    assert (report.verdict, list(report.findings)) == ("pass", [])
    rows = {(row.edge, row.output) for row in report.evidence().conversion}
    caches = {output for _, output in rows}
    assert rows == {(edge, output) for edge in ("C_o", "C_e") for output in caches}, "twins"
    assert {row.output for row in report.evidence().interaction} == {"logits"}


PARTS = ("key", "value")
PAST, PRESENT = "past_key_values.0.key", "present.0.key"

READ: dict[str, Defect] = {
    "a key cache that is not used": partial(mutants.zero_input, name=PAST),
    "a value cache that is not used": partial(mutants.zero_input, name="past_key_values.1.value"),
    "the oldest key lost": partial(mutants.lose_oldest, name=PAST),
}


@pytest.mark.parametrize("defect", READ)
def test_a_cache_read_wrongly_is_seen_in_the_logits(
    lab: Lab, plant: Plant, case: Case, defect: str
) -> None:
    """With an empty cache these graphs are right: only a decode step shows it."""
    report = lab.diff(case, onnx=plant(case.onnx, READ[defect]))
    sites = [f.site for f in report.findings]
    assert found(report) == {("conversion", "wrong value")}
    assert any(s.startswith("C_o/logits/") and "cache of" in s for s in sites), sites


@pytest.mark.parametrize("name", [PRESENT, "present.1.value"])
def test_a_cache_written_wrongly_is_named(lab: Lab, plant: Plant, case: Case, name: str) -> None:
    report = lab.diff(case, onnx=plant(case.onnx, partial(mutants.zero_output, name=name)))
    assert {stage for stage, _ in found(report)} == {"conversion"}
    assert any(f.site.startswith(f"C_o/{name}") for f in report.findings)


def test_a_cache_written_wrongly_and_never_read_is_named(
    lab: Lab, plant: Plant, case: Case
) -> None:
    """A graph for the prompt alone: it writes a cache, but reads none."""
    names = [f"past_key_values.{n}.{part}" for n in (0, 1) for part in PARTS]
    defects = [partial(mutants.empty_input, name=name) for name in names]
    clean = plant(case.onnx, *defects)
    assert lab.diff(case, onnx=clean).verdict == "pass"
    wrong = plant(case.onnx, *defects, partial(mutants.zero_output, name=PRESENT))
    report = lab.diff(case, onnx=wrong)
    assert {f.site for f in measured(report)} == {f"C_o/{PRESENT}"}


def test_caches_of_other_names_are_mapped_by_order(lab: Lab, plant: Plant, case: Case) -> None:
    names = mutants.name_caches_otherwise
    assert lab.diff(case, onnx=plant(case.onnx, names)).verdict == "pass"
    wrong = plant(case.onnx, partial(mutants.zero_output, name=PRESENT), names)
    assert finding(lab.diff(case, onnx=wrong), "conversion", "wrong value")


UNWRITTEN: dict[str, Defect] = {
    "not given": partial(mutants.drop_output, name=PRESENT),
    "under a name that is nobody's": partial(mutants.rename_value, name=PRESENT, new="a_cache"),
}


@pytest.mark.parametrize("defect", UNWRITTEN)
def test_a_cache_that_is_read_but_not_written_is_a_finding(
    lab: Lab, plant: Plant, case: Case, defect: str
) -> None:
    """Whoever goes on from one run to the next by the names of the others does not find it."""
    report = lab.diff(case, onnx=plant(case.onnx, UNWRITTEN[defect]))
    assert found(report) == {("interface", "missing output"), ("coverage", "not measured")}
    assert finding(report, "interface", "missing output").site.startswith(f"R_o/{PRESENT}/")


def test_caches_of_other_names_and_of_another_number_are_refused(
    lab: Lab, plant: Plant, case: Case
) -> None:
    missing = partial(mutants.drop_output, name=PRESENT)
    path = plant(case.onnx, missing, mutants.name_caches_otherwise)
    with pytest.raises(OnnxError, match=r"reads 4 caches and writes 3.* such as 'present.0.key'"):
        lab.diff(case, onnx=path)


def test_a_task_that_would_leave_the_cache_unseen_is_refused(lab: Lab, case: Case) -> None:
    with pytest.raises(InputError, match=f"give --task {TASK}"):
        lab.diff(case, task="causal-lm")


def test_a_cache_of_a_layer_that_the_model_has_not_is_a_finding(
    lab: Lab, plant: Plant, case: Case
) -> None:
    path = plant(case.onnx, partial(mutants.copy_output, name=PRESENT, new="present.2.key"))
    report = lab.diff(case, onnx=path)
    assert found(report) == {("interface", "extra output")}
    assert finding(report, "interface", "extra output").site.startswith("R_o/present.2.key/")


def test_an_edited_conversion_without_a_cache_is_a_finding(lab: Lab, case: Case) -> None:
    plain = lab.case("llama")
    report = lab.diff_edited(case, edited_onnx=plain.edited_onnx)
    assert finding(report, "interface", "missing output").site.startswith("R_e/present.0.key/")
    assert finding(report, "coverage", "not measured").site == "C_e/present.N"


def test_a_missing_conversion_is_exported_with_the_cache_of_the_other(
    lab: Lab, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, export = [], pairs.export_graph

    def exported(model: Path, file: Path, *, task: str) -> None:
        tasks.append(task)
        export(model, file, task=task)

    monkeypatch.setattr(pairs, "export_graph", exported)
    assert lab.diff_edited(case, edited_onnx=None).verdict == "pass"
    assert tasks == [TASK]


def test_a_defect_far_below_the_largest_cache_is_caught(lab: Lab, plant: Plant, case: Case) -> None:
    """Each cache has its own noise: one is not measured by another's."""
    change = partial(mutants.scale_output, name="present.0.value", factor=1 + 1e-4)
    report = lab.diff(case, onnx=plant(case.onnx, change))
    assert any(f.site.startswith("C_o/present.0.value/") for f in report.findings)


def test_caches_are_those_of_the_whole_sequence(lab: Lab, case: Case) -> None:
    """In two parts or at once: the same caches and logits."""
    from surgery.runtimes import RUNTIMES, ModelRef
    from surgery.stimuli.batches import cache_batches

    refs = [ModelRef("torch", case.model, TASK)]
    refs += [ModelRef(name, case.onnx, TASK) for name in ("onnxruntime", "reference")]
    torch, *others = (RUNTIMES[ref.runtime](ref, 1) for ref in refs)
    for batch in cache_batches(200, 32, seed=0):
        real = batch.attention_mask == 1
        expected = torch.infer(batch.inputs(), batch.split)
        for other in others:
            parts = other.infer(batch.inputs(), batch.split)
            assert set(parts) == set(expected)
            for name, array in parts.items():
                pair = [a if a.ndim == 3 else a.swapaxes(1, 2) for a in (array, expected[name])]
                np.testing.assert_allclose(*(a[real] for a in pair), rtol=0, atol=1e-5)
