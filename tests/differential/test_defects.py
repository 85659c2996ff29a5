"""Every planted defect of the original's conversion fails, and the finding says what and where."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from differential import mutants
from differential.lab import Lab, finding, found
from onnx import ModelProto
from onnx_files import endless, enormous, save

from surgery import pipeline, process
from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.differential import Limits, Workload, make_workload
from surgery.errors import OnnxError
from surgery.export import default_task
from surgery.policy import BUILT_IN
from surgery.stimuli.prompts import load_stimuli

Defect = Callable[[ModelProto], None]
Plant = Callable[..., Path]

QUERY = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
ENCODER_BIAS = "encoder.layer.1.output.dense.bias"

WRONG_VALUES: dict[str, tuple[str, Defect]] = {
    "attention to padding, relative positions": ("llama", mutants.ignore_mask),
    "attention to padding, absolute positions": ("gpt2", mutants.ignore_mask),
    "attention to padding, encoder": ("bert", mutants.ignore_mask),
    "positions counted from the padding": ("gpt2", mutants.ignore_positions),
    "attention to later tokens": ("llama", mutants.look_ahead),
    "approximate GELU": ("bert", mutants.approximate_gelu),
    "rounded to float16, declared float32": ("llama", mutants.through_float16),
    "norm epsilon 10% larger, root mean square": (
        "llama",
        partial(mutants.scale_epsilons, factor=1.1),
    ),
    "norm epsilon 10% larger, layer norm": ("gpt2", partial(mutants.scale_epsilons, factor=1.1)),
    "norm epsilon 10% larger, queries and keys": (
        "qwen3",
        partial(mutants.scale_epsilons, factor=1.1),
    ),
    "norm epsilon 1e-5 for 1e-12": ("bert", partial(mutants.scale_epsilons, factor=1e7)),
}


@pytest.mark.parametrize("defect", WRONG_VALUES)
def test_wrong_values_are_seen_in_the_output_alone(lab: Lab, plant: Plant, defect: str) -> None:
    """No weight is changed that lineage could name: only running the model shows these."""
    family, plan = WRONG_VALUES[defect]
    case = lab.case(family)
    report = lab.diff(case, onnx=plant(case.onnx, plan))
    wrong = finding(report, "conversion", "wrong value")
    output = default_task(case.model).output
    assert wrong.site.startswith(f"C_o/{output}/")
    assert wrong.limit == BUILT_IN.conversion.max_noise_ratio
    assert wrong.value is not None
    assert wrong.value > 10
    assert found(report) == {("conversion", "wrong value")}


def test_a_defect_of_ten_times_the_noise_is_caught(lab: Lab, plant: Plant) -> None:
    """One output feature off by ten times the largest float32 error, nothing else."""
    case = lab.case("llama")
    noise = lab.diff(case).evidence().conversion[0].noise_max
    values = np.zeros(200)
    values[17] = 10 * noise
    report = lab.diff(case, onnx=plant(case.onnx, partial(mutants.add, values=values)))
    assert finding(report, "conversion", "wrong value").value == pytest.approx(10, rel=0.2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_ignored_mask_is_worst_where_there_is_padding(lab: Lab, plant: Plant, side: str) -> None:
    """Without padding the defect does nothing, so the finding must name a padded batch."""
    case = lab.case("bert")
    report = lab.diff(case, onnx=plant(case.onnx, mutants.ignore_mask))
    workload = workload_of(case.model, lab.stimuli)
    padded = {row for b in workload.batches if not b.attention_mask.all() for row in b.rows}
    site = finding(report, "conversion", "wrong value").site
    assert site.split("/", 2)[2].split(" @ ")[0] in padded
    assert any(f"{side} padding" in row for row in padded)


def workload_of(model: Path, stimuli: Path) -> Workload:
    base = Checkpoint.open(model)
    given = load_stimuli([stimuli])
    return make_workload(base, identify(base), default_task(model), given, BUILT_IN)


def unused_token(model: Path, stimuli: Path) -> int:
    used = {int(n) for b in workload_of(model, stimuli).batches for n in np.unique(b.input_ids)}
    return min(set(range(200)) - used)


# ------------------------------------------------------------------------------------ embedding


@pytest.mark.parametrize("renamed", [False, True])
def test_a_zeroed_embedding_row_of_an_unused_token_is_named(
    lab: Lab, plant: Plant, renamed: bool
) -> None:
    """No stimulus can show it, so the rows are compared at the cut after the lookup."""
    case = lab.case("llama")
    token = unused_token(case.model, lab.stimuli)
    defects = [partial(mutants.zero_row, name=EMBEDDING, row=token)]
    if renamed:
        defects.append(partial(mutants.rename, name=EMBEDDING, new="table"))
    report = lab.diff(case, onnx=plant(case.onnx, *defects))
    assert finding(report, "embedding", "wrong value").site == f"R_o/token {token}"
    assert found(report) == {("embedding", "wrong value"), ("lineage", "row")}


def test_token_ids_that_overflow_are_named_by_the_first_of_them(lab: Lab, plant: Plant) -> None:
    case = lab.case("llama")
    report = lab.diff(case, onnx=plant(case.onnx, mutants.narrow_ids))
    assert finding(report, "embedding", "wrong value").site == "R_o/token 128"
    assert "72 of 200" in finding(report, "embedding", "wrong value").message


def test_embedding_rows_that_cannot_be_compared_are_a_finding(lab: Lab, plant: Plant) -> None:
    """Rows that were not seen must not count as covered."""
    case = lab.case("llama")
    report = lab.diff(case, onnx=plant(case.onnx, partial(mutants.hide_lookup, name=EMBEDDING)))
    assert finding(report, "coverage", "embedding not compared").site == "R_o"
    assert report.evidence().covered_rows == 0


# -------------------------------------------------------------------------------------- lineage


def test_swapped_weights_are_both_named_by_lineage(lab: Lab, plant: Plant) -> None:
    other = QUERY.replace("layers.1", "layers.0")
    case = lab.case("llama")
    swap = partial(mutants.swap, one=QUERY, other=other)
    report = lab.diff(case, onnx=plant(case.onnx, swap))
    swapped = {f.site for f in report.findings if f.symptom == "swapped"}
    assert swapped == {f"R_o/{QUERY}", f"R_o/{other}"}


def test_a_transposed_square_weight_is_named_by_lineage_and_seen_in_the_output(
    lab: Lab, plant: Plant
) -> None:
    case = lab.case("llama")
    turn = partial(mutants.change, name=QUERY, how=np.transpose)
    report = lab.diff(case, onnx=plant(case.onnx, turn))
    assert finding(report, "lineage", "transposed").site == f"R_o/{QUERY}"
    assert found(report) == {("lineage", "transposed"), ("conversion", "wrong value")}


def test_a_changed_bias_is_named_by_lineage_and_seen_in_the_output(lab: Lab, plant: Plant) -> None:
    case = lab.case("bert")
    zero = partial(mutants.change, name=ENCODER_BIAS, how=np.zeros_like)
    report = lab.diff(case, onnx=plant(case.onnx, zero))
    assert finding(report, "lineage", "truncated").site == f"R_o/bert.{ENCODER_BIAS}"
    assert finding(report, "conversion", "wrong value").site.startswith("C_o/last_hidden_state/")


# ------------------------------------------------------------------------------------ interface


INTERFACE: dict[str, tuple[Defect, str]] = {
    "float16 output": (mutants.to_float16, "dtype"),
    "another output in its place": (mutants.pool_output, "missing output"),
    "one feature less": (partial(mutants.cut_features, size=199), "shape"),
    "fourth axis": (partial(mutants.reshape, shape=[0, 0, 2, 100]), "shape"),
    "positions in one row": (partial(mutants.reshape, shape=[1, -1, 200]), "shape"),
}


@pytest.mark.parametrize("defect", INTERFACE)
def test_another_interface_is_a_finding_that_names_the_output(
    lab: Lab, plant: Plant, defect: str
) -> None:
    change, symptom = INTERFACE[defect]
    case = lab.case("llama")
    report = lab.diff(case, onnx=plant(case.onnx, change))
    assert finding(report, "interface", symptom).site.startswith("R_o/logits/")


def test_an_output_that_is_only_called_otherwise_is_mapped(lab: Lab, plant: Plant) -> None:
    """Other exporters have other names; the numbers are judged all the same."""
    case = lab.case("llama")
    rename = partial(mutants.rename_output, new="scores")
    assert lab.diff(case, onnx=plant(case.onnx, rename)).verdict == "pass"
    wrong = lab.diff(case, onnx=plant(case.onnx, mutants.through_float16, rename))
    assert finding(wrong, "conversion", "wrong value").site.startswith("C_o/logits/")


def test_a_missing_cache_output_is_a_finding(lab: Lab) -> None:
    """A file without a cache is no file for the task with one."""
    report = lab.diff(lab.case("llama"), task="causal-lm-with-past")
    missing = {f.site.split("/")[1] for f in report.findings if f.symptom == "missing output"}
    assert missing == {f"present.{n}.{part}" for n in (0, 1) for part in ("key", "value")}


# ------------------------------------------------------------------------------------------ NaN


NANS: dict[str, tuple[Defect, str]] = {
    "everywhere": (mutants.nan_everywhere, "run"),
    "in padded batches": (mutants.nan_in_padded_batches, "run"),
    "under padding alone": (mutants.nan_at_padding, "interface"),
}


@pytest.mark.parametrize("where", NANS)
def test_nan_is_a_finding_at_its_first_batch(lab: Lab, plant: Plant, where: str) -> None:
    defect, stage = NANS[where]
    case = lab.case("llama")
    report = lab.diff(case, onnx=plant(case.onnx, defect))
    assert finding(report, stage, "nan").site == "R_o/logits/target/0"


# -------------------------------------------------------------------------------- runs that end


FAILS: dict[str, Defect] = {
    "batch declared as 2": partial(mutants.fix_batch, size=2),
    "batch of 2 in the graph": partial(mutants.add, values=np.zeros((2, 1, 1))),
    "length of 7 in the graph": partial(mutants.add, values=np.zeros((1, 7, 1))),
    "impossible shape": partial(mutants.reshape, shape=[7, 11, 13]),
}


@pytest.mark.parametrize("defect", FAILS)
def test_a_graph_that_cannot_run_every_shape_is_a_finding(
    lab: Lab, plant: Plant, defect: str
) -> None:
    case = lab.case("llama")
    report = lab.diff(case, onnx=plant(case.onnx, FAILS[defect]))
    assert finding(report, "run", "error").site == "R_o"
    assert report.corners["R_o"].status == "error"


@pytest.mark.parametrize(
    ("graph", "seconds", "status", "said"),
    [(endless, 5, "timeout", "killed at the limit of 5 s"), (enormous, 120, "error", "allocate")],
)
def test_a_run_that_hangs_or_wants_4_tib_ends_and_is_a_finding(
    lab: Lab,
    tmp_path: Path,
    graph: Callable[[], ModelProto],
    seconds: float,
    status: str,
    said: str,
) -> None:
    """Only onnxruntime runs in a child here: it is the one to be killed."""
    case, run = lab.case("llama"), process.run

    def run_onnx_in_a_child(
        module: str, arguments: dict[str, Any], folder: Path, limits: Limits
    ) -> process.Ending:
        in_child = arguments.get("model", {}).get("runtime") == "onnxruntime"
        return (run if in_child else lab.here)(module, arguments, folder, limits)

    model = graph()
    mutants.put(model, "table", np.zeros((200, 4), np.float32))
    path = save(model, tmp_path / "m.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "run", run_onnx_in_a_child)
        report = pipeline.diff(case.model, onnx=path, limits=Limits(seconds=seconds))
    assert finding(report, "run", status).site == "R_o"
    assert said in report.corners["R_o"].detail
    assert report.corners["T_o"].status == "ok"


def test_truncated_external_data_is_bad_input_and_not_a_verdict(lab: Lab, tmp_path: Path) -> None:
    source = lab.case("llama").onnx
    for file in source.parent.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data if file == source else data[:-1])
    with pytest.raises(OnnxError, match=r"which has only \d+ bytes"):
        pipeline.diff(lab.case("llama").model, onnx=tmp_path / source.name)


# ----------------------------------------------------------------------------- through children


WHOLE: dict[str, tuple[Defect, str, str]] = {
    "transposed square weight": (
        partial(mutants.change, name=QUERY, how=np.transpose),
        "conversion",
        "wrong value",
    ),
    "NaN": (mutants.nan_everywhere, "run", "nan"),
    "impossible shape": (partial(mutants.reshape, shape=[7, 11, 13]), "run", "error"),
}


@pytest.mark.campaign
@pytest.mark.parametrize("defect", WHOLE)
def test_defects_are_found_through_children_too(lab: Lab, plant: Plant, defect: str) -> None:
    change, stage, symptom = WHOLE[defect]
    case = lab.case("llama")
    report = pipeline.diff(case.model, onnx=plant(case.onnx, change), stimuli=[lab.stimuli])
    assert finding(report, stage, symptom).site.startswith(("R_o", "C_o/logits/"))
