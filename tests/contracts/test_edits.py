"""Every op on every model: the edited weights are the intervention, or the op says why not."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import sub
from pathlib import Path

import pytest
from cases import (
    CASES,
    MEANT,
    REFUSED,
    WIDTH,
    Case,
    dampening_cases,
    direction_cases,
    mean_cases,
    merge_cases,
    neuron_cases,
    pruning_cases,
    spectrum_cases,
    written_cases,
)
from models import MODELS
from oracles import assert_equivalent, assert_rounded_once, edited_logits, load_model, logits
from recipes import (
    HEADS,
    NEURONS,
    apply_edits,
    editor_of,
    make_sae,
    plan_of,
    sae_edit,
    weight_files,
)

from surgery.arch.inspection import inspect
from surgery.checkpoint import Checkpoint
from surgery.console.checkpoints import plan_json, plan_text
from surgery.edits import OPS
from surgery.errors import EditError
from surgery.plan import Plan
from surgery.verify import verify


def test_every_registered_op_is_tried_on_every_model() -> None:
    assert {case.op for case in CASES} == set(OPS)
    tried = {(case.way, case.model) for case in CASES}
    assert tried == {(case.way, model) for case in CASES for model in MODELS}


def assert_told(plan: Plan, output: Path) -> None:
    """`plan` names every tensor with its role and its regions, or the shape that pruning leaves,
    and the bytes that were written."""
    told, text = plan_json(plan), plan_text(plan)
    rows = {line.split()[0]: line.split()[1:3] for line in text.splitlines()}
    found = {row.name: row for row in inspect(output).tensors}
    written = 0
    for tensor in told["tensors"]:
        name = tensor["name"]
        assert tensor["role"] == found[name].role
        regions = [(region["start"], region["stop"]) for region in tensor["regions"]]
        written += 4 * sum(math.prod(map(sub, stop, start)) for start, stop in regions)
        resized = told["pruned"] | told["grown"]
        if name in resized:
            assert resized[name] == list(found[name].shape)
            assert f"{name} becomes {'×'.join(map(str, found[name].shape))} instead" in text
        else:
            assert rows[name] == [tensor["role"], str(len(regions))]
    assert told["edited_bytes"] == written > 0
    assert told["disk_bytes"] == sum(map(len, weight_files(output).values()))
    changed = {
        row.name
        for row in inspect(plan.base.root).tensors
        if plan.base.read_bytes(row.name) != Checkpoint.open(output).read_bytes(row.name)
    }
    assert changed <= {tensor["name"] for tensor in told["tensors"]}


@pytest.mark.parametrize("case", MEANT, ids=str)
def test_edited_weights_do_what_the_hook_does(
    case: Case, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    fields = case.prepare(tmp_path, base_of(case.model))
    editor = editor_of(tmp_path, base_of(case.model), **fields)
    assert_equivalent(editor, tmp_path / "out")
    assert_rounded_once(editor, tmp_path / "out")
    assert_told(editor.plan, tmp_path / "out")
    recipe = tmp_path / "recipe.json"
    assert verify(tmp_path / "out", base_of(case.model), recipe).findings == ()


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_an_edit_without_meaning_says_why(
    case: Case, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    fields = case.prepare(tmp_path, base_of(case.model))
    with pytest.raises(EditError) as caught:
        plan_of(tmp_path, base_of(case.model), **fields)
    assert case.refused in str(caught.value)
    assert "@ edits[0]" in str(caught.value)


BY_DTYPE = [
    Case("gpt2", {**HEADS, "factor": 0.3}),
    Case("bert", {**NEURONS, "factor": 0.3}),
    *(case for case in mean_cases() if case.model in ("gpt2", "llama") and not case.refused),
    *(case for case in pruning_cases() if case.model in ("llama", "qwen3_moe")),
    *(case for case in dampening_cases() if case.model in ("gpt2", "phi3") and not case.refused),
    Case("llama", sae_edit("orthogonalize", strength=0.9), "blocks.1.hook_resid_post"),
    Case("qwen3", sae_edit("z_project"), "blocks.1.attn.hook_z"),
    Case(
        "gpt2",
        sae_edit("rank1", strength=0.2, layers="all"),
        "blocks.1.hook_resid_post",
        untie=True,
    ),
    *(case for case in neuron_cases() if case.model == "opt" and not case.refused),
    Case("llama", sae_edit("steer_bias"), "blocks.0.hook_mlp_out"),
    Case("gpt2", sae_edit("steer_bias"), "blocks.0.attn.hook_z"),
    *(case for case in written_cases() if case.model in ("gpt2", "qwen3")),
    *(case for case in direction_cases() if case.model in ("gpt2", "llama")),
    Case("bert", {"op": "layers", "layers": [0], "factor": 0.3}),
    *(case for case in merge_cases() if case.model == "qwen3"),
    *(case for case in spectrum_cases() if case.model == "gpt2"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("case", BY_DTYPE, ids=str)
def test_it_holds_in_every_storage_type(
    case: Case, dtype: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    fields = case.prepare(tmp_path, base_of(case.model, dtype))
    editor = editor_of(tmp_path, base_of(case.model, dtype), **fields)
    assert_equivalent(editor, tmp_path / "out")
    assert_rounded_once(editor, tmp_path / "out")


FLAGGED = {
    "heads": ("gpt_neox-sequential", "falcon-new", "llama", "gemma2"),
    "neurons": ("opt-unbiased", "llama"),
}
"""Some models whose bias is there once the config says so."""

ADDING = [
    *(case for case in mean_cases() if case.model in FLAGGED[case.edit["op"]]),
    Case("gpt2", sae_edit("orthogonalize"), "blocks.1.hook_resid_post", untie=True),
    Case("qwen3", sae_edit("orthogonalize"), "blocks.1.hook_resid_post", untie=True),
    Case(
        "bert",
        sae_edit("orthogonalize", approximate=True),
        "blocks.1.hook_resid_post",
        untie=True,
    ),
    Case("opt-unbiased", sae_edit("append_neuron", strength=0.2), "blocks.0.mlp.input"),
    Case("llama", sae_edit("steer_bias"), "blocks.1.hook_resid_post"),
    Case("qwen3", sae_edit("steer_bias"), "blocks.1.hook_attn_out"),
    *(
        Case(
            model,
            sae_edit("orthogonalize", approximate=True),
            "blocks.1.hook_resid_post",
            untie=True,
        )
        for model in ("roberta", "distilbert", "bloom", "falcon", "mpt", "opt", "qwen2", "gemma2")
    ),
    Case("falcon-new", sae_edit("steer_bias"), "blocks.1.hook_resid_post"),
    Case("opt-unbiased", sae_edit("steer_bias"), "blocks.1.hook_resid_post"),
    Case("gpt_neox-sequential", sae_edit("steer_bias"), "blocks.1.attn.hook_z"),
    Case("qwen3_moe", sae_edit("steer_bias"), "blocks.1.hook_attn_out"),
    Case("gemma3_text", sae_edit("steer_bias"), "blocks.1.attn.hook_z"),
]


@pytest.mark.parametrize("case", ADDING, ids=str)
def test_added_tensors_load_in_stock_transformers(
    case: Case, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Storage is float32, so what stock transformers loads is what was computed."""
    fields = case.prepare(tmp_path, base_of(case.model))
    editor = editor_of(tmp_path, base_of(case.model), **fields)
    assert editor.plan.added
    expected = edited_logits(editor, tmp_path / "out")
    found = logits(load_model(tmp_path / "out"))
    assert (found == expected).all()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_sharded_model_can_be_edited_and_extended(
    family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(base_of(family, "bfloat16"), dtype="bfloat16")
    model.save_pretrained(base, max_shard_size="20KB")
    make_sae(tmp_path / "sae", "blocks.1.hook_attn_out", WIDTH)
    edits = [sae_edit("steer_bias"), HEADS]
    editor = editor_of(tmp_path, base, edits)
    assert len(editor.plan.headers) > 2
    assert_equivalent(editor, tmp_path / "result")
    assert_rounded_once(editor, tmp_path / "result")
    assert verify(tmp_path / "result", base, tmp_path / "recipe.json").ok
    assert apply_edits(tmp_path, base, edits).is_dir()
