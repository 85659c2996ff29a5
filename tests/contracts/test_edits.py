"""Every op on every model: the edited weights are the intervention, or the op says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from inputs import (
    SQUARE,
    write_adapter,
    write_auroc,
    write_box,
    write_factors,
    write_means,
    write_partners,
    write_patch,
    write_vector,
)
from models import FAMILIES, MODELS
from oracles import assert_equivalent, assert_rounded_once, edited_logits, load_model, logits
from recipes import HEADS, NEURONS, apply_edits, editor_of, make_sae, plan_of, sae_edit

from surgery.edits import OPS
from surgery.errors import EditError
from surgery.verify import verify

WIDTH = 32
WIDE_HEADS = (
    "llama-biased", "mistral", "qwen3", "qwen3_moe", "gemma", "gemma-biased", "gemma2",
    "gemma3_text",
)  # fmt: skip
Z_WIDTH = {model: 64 if model in WIDE_HEADS else 32 for model in MODELS}
EXPERT_NEURONS = {
    "mixtral": ["L0E1N3", "L1E0N40", "L1E2N40"],
    "qwen3_moe": ["L0N47", "L1E1N3", "L1E0N3", "L1E0N39"],
}
HOOKS = (
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_resid_post",
    "attn.hook_z",
)
ATTENTION = ("hook_attn_out", "hook_resid_mid", "attn.hook_z")
PARALLEL = tuple(hook for hook in HOOKS if hook != "hook_resid_mid")
STEERED: dict[str, tuple[str, ...]] = {
    "gptj": ("hook_resid_pre", "hook_mlp_out", "hook_resid_post"),
    "gpt_neox": PARALLEL,
    "falcon": PARALLEL, "falcon-biased": PARALLEL, "falcon-new": PARALLEL,
    "falcon-one-norm": PARALLEL,
    "mpt": (), "mistral": (), "qwen2": (), "phi3": (), "phi3-partial": (), "mixtral": (),
    "qwen3": ATTENTION, "qwen3_moe": ATTENTION, "gemma": ATTENTION, "gemma-biased": ATTENTION,
    "gemma2": ("attn.hook_z",), "gemma3_text": ("attn.hook_z",),
}  # fmt: skip
"""Where a bias can hold a vector; everywhere, in models that are not listed."""
ENCODERS = ("bert", "roberta", "distilbert")
RESCALED = (*ENCODERS, "gemma2", "gemma3_text")
"""Models that normalise what blocks write; bloom does so with its embeddings alone."""


@dataclass(frozen=True)
class Case:
    """One edit of one model; `refused` is what the error says where it has no meaning."""

    model: str
    edit: dict[str, Any]
    hook: str = ""
    refused: str = ""
    untie: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    files: Callable[[Path, Path], None] | None = None

    def __str__(self) -> str:
        op = self.edit.get("patch", self.edit["op"])
        op = f"mean-{op}" if "mean" in self.edit else op
        keys = {
            "op",
            "sae",
            "patch",
            "features",
            "heads",
            "neurons",
            "file",
            "adapter",
            "at",
            "vector",
            "mean",
            "auroc",
        }
        rest = [f"{k}={v}" for k, v in self.edit.items() if k not in keys]
        return "-".join([self.model, op, self.hook.replace("blocks.", ""), *rest])

    def prepare(self, folder: Path, base: Path) -> dict[str, Any]:
        """Writes the files the edit reads for the model `base`; returns the recipe's fields."""
        if self.files is not None:
            self.files(folder, base)
        if self.hook:
            width = Z_WIDTH[self.model] if self.hook.endswith("hook_z") else WIDTH
            make_sae(folder / "sae", self.hook, width)
        return {"edits": [self.edit], "untie": self.untie}


def scaling_cases() -> Iterator[Case]:
    for model in MODELS:
        neurons = {**NEURONS, "neurons": EXPERT_NEURONS.get(model, NEURONS["neurons"])}
        for edit in (HEADS, neurons):
            for factor in (0.0, 0.5, -2.0):
                yield Case(model, {**edit, "factor": factor})


BIASLESS = {
    "heads": ("gptj", "mpt", "mistral", "qwen2", "phi3", "phi3-partial", "mixtral"),
    "neurons": (
        "mpt", "mistral", "qwen2", "qwen3", "gemma", "gemma-biased", "gemma2", "gemma3_text",
        "phi3", "phi3-partial",
    ),
}  # fmt: skip
"""Models whose output or down projection can have no bias."""


def mean_cases() -> Iterator[Case]:
    """Two heads of one layer go into one bias, and a head of another layer."""
    heads = {**HEADS, "heads": ["L0H1", "L1H2", "L1H0"], "mean": {"file": "means.safetensors"}}
    neurons = {**NEURONS, "neurons": ["L0N3", "L1N40", "L1N0"]}
    neurons["mean"] = {"file": "means.safetensors", "key": "neurons"}
    for model in MODELS:
        for edit in (heads, neurons):
            family, role = model.partition("-")[0], "o_proj" if edit is heads else "down_proj"
            refused = f"{family} has no bias at {role}" if model in BIASLESS[edit["op"]] else ""
            if edit is neurons and model in EXPERT_NEURONS:
                edit, refused = {**edit, "neurons": EXPERT_NEURONS[model]}, "depends on the router"
            for factor in (0.0, -0.5):
                yield Case(model, {**edit, "factor": factor}, refused=refused, files=write_means)


GATED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "mixtral",
    "qwen3_moe",
)  # fmt: skip
"""Families with two projections before the product of the MLP."""


def dampening_cases() -> Iterator[Case]:
    edit = {"op": "neurons", "auroc": {"file": "auroc.csv"}}
    for model in MODELS:
        family = model.partition("-")[0]
        sides = [{"on": "gate"}, {"on": "up"}] if family in GATED else [{}]
        for side in sides:
            for method in (
                {"method": "aura"},
                {"method": "det0", "top": 2},
                {"method": "damp", "factor": -0.5},
            ):
                yield Case(model, {**edit, **side, **method}, files=write_auroc)
        wrong = {} if family in GATED else {"on": "gate"}
        refused = f"{family} has a gated MLP" if family in GATED else f"{family} has no gate"
        edit_ = {**edit, **wrong, "method": "aura"}
        yield Case(model, edit_, refused=refused, files=write_auroc)


def projection_cases() -> Iterator[Case]:
    post, z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
    for model in MODELS:
        allow = {"approximate": True} if model in RESCALED else {}
        whole = {"approximate": True} if model == "bloom" else allow
        for features, more in (((1, 4, 7), {}), ((2,), {"strength": 0.5, "center": True})):
            edit = sae_edit("orthogonalize", features, **whole, **more)
            yield Case(model, edit, post, untie=True)
        for layers in ([1], "0-1"):
            edit = sae_edit("orthogonalize", layers=layers, **allow)
            yield Case(model, edit, "blocks.0.hook_mlp_out")
        yield Case(model, sae_edit("z_project", strength=0.75), z)
        yield Case(model, sae_edit("z_project", (3,)), "blocks.0.attn.hook_z")
        yield Case(model, sae_edit("z_project"), post, refused="hooks 'hook_resid_post'")
        yield Case(model, sae_edit("orthogonalize", **allow), z, refused="hooks 'attn.hook_z'")
    for model in (*RESCALED, "bloom"):
        edit = sae_edit("orthogonalize")
        yield Case(model, edit, post, untie=True, refused="which normalises what")
    for model in RESCALED:
        edit = sae_edit("orthogonalize", layers=[0])
        yield Case(model, edit, post, refused="which normalises what")


def steering_cases() -> Iterator[Case]:
    for model in MODELS:
        for hook in HOOKS:
            for layer in (0, 1):
                yield Case(
                    model,
                    sae_edit("steer_bias", strength=3.0),
                    f"blocks.{layer}.{hook}",
                    refused=steering_refusal(model, hook, layer),
                )
        if STEERED.get(model, HOOKS):
            yield Case(
                model,
                sae_edit("steer_bias"),
                "blocks.0.hook_normalized",
                refused="hooks 'hook_normalized'",
            )


def steering_refusal(model: str, hook: str, layer: int) -> str:
    """Why no bias can hold a vector there, by hand: what enters the first block of a decoder is
    an embedding without a bias, but in bloom, which normalises it."""
    steered, family = STEERED.get(model, HOOKS), model.partition("-")[0]
    if not steered:
        return f"{family} has no bias that could hold this steering"
    if hook not in steered:
        return f"hooks '{hook}'; steer_bias on {family} needs one of"
    first = hook == "hook_resid_pre" and layer == 0 and model not in (*ENCODERS, "bloom")
    return f"{family} has no bias at blocks.0" if first else ""


def written_cases() -> Iterator[Case]:
    for family in FAMILIES:
        at = {SQUARE[family].format(1): [3, 5]}
        yield Case(family, {"op": "tensor", "file": "patch.safetensors"}, files=write_patch)
        yield Case(family, {"op": "tensor", "file": "box.safetensors", "at": at}, files=write_box)
        for scale in (1.0, -0.5):
            edit = {"op": "low_rank", "file": "uv.safetensors", "scale": scale}
            yield Case(family, edit, files=write_factors, untie=True)
        yield Case(family, {"op": "lora", "adapter": "adapter"}, files=write_adapter, untie=True)


def direction_cases() -> Iterator[Case]:
    vector = {"vector": {"file": "d.safetensors", "key": "d"}}
    edit = {"op": "direction", **vector}
    for family in FAMILIES:
        allow = {"approximate": True} if family == "bert" else {}
        for more in (
            {},
            {"strength": 0.5, "layers": [1]},
            {"keep_norms": "columns"},
            {"keep_norms": "columns", "strength": -0.5, "matrices": ["down_proj", "embed"]},
            {"matrices": ["o_proj"], "layers": "0-1"},
        ):
            yield Case(family, {**edit, **allow, **more}, files=write_vector, untie=True)
    yield Case("bert", edit, refused="direction is not exact on bert", files=write_vector)


def layer_cases() -> Iterator[Case]:
    for family in FAMILIES:
        for part, factor in (("attn", 0.0), ("mlp", -0.5), ("both", 2.0)):
            yield Case(family, {"op": "layers", "layers": [1], "part": part, "factor": factor})
        yield Case(family, {"op": "layers", "layers": "0-1"})


def merge_cases() -> Iterator[Case]:
    one = {"op": "merge", "with": [{"model": "other", "weight": 0.4}]}
    two = {**one, "with": [*one["with"], {"model": "third", "weight": 0.3}]}
    for family in FAMILIES:
        for edit in (
            {**one, "include": ["*.1.*"], "exclude": ["*norm*"]},
            {**two, "method": "task_arithmetic"},
            {**one, "method": "slerp"},
            {**two, "method": "ties", "density": 0.3},
        ):
            yield Case(family, edit, files=write_partners)


CASES = [
    *scaling_cases(),
    *mean_cases(),
    *dampening_cases(),
    *projection_cases(),
    *steering_cases(),
    *written_cases(),
    *direction_cases(),
    *layer_cases(),
    *merge_cases(),
]
MEANT = [case for case in CASES if not case.refused]
REFUSED = [case for case in CASES if case.refused]


def test_every_registered_op_is_tried_on_every_model() -> None:
    tried = {(case.edit["op"], case.model) for case in MEANT}
    assert tried == {(op, model) for op in OPS for model in MODELS}


@pytest.mark.parametrize("case", MEANT, ids=str)
def test_edited_weights_do_what_the_hook_does(
    case: Case, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    fields = case.prepare(tmp_path, base_of(case.model))
    editor = editor_of(tmp_path, base_of(case.model), **fields)
    assert_equivalent(editor, tmp_path / "out")
    assert_rounded_once(editor, tmp_path / "out")
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
    *(case for case in dampening_cases() if case.model in ("gpt2", "phi3") and not case.refused),
    Case("llama", sae_edit("orthogonalize", strength=0.9), "blocks.1.hook_resid_post"),
    Case("qwen3", sae_edit("z_project"), "blocks.1.attn.hook_z"),
    Case("llama", sae_edit("steer_bias"), "blocks.0.hook_mlp_out"),
    Case("gpt2", sae_edit("steer_bias"), "blocks.0.attn.hook_z"),
    *(case for case in written_cases() if case.model in ("gpt2", "qwen3")),
    *(case for case in direction_cases() if case.model in ("gpt2", "llama")),
    Case("bert", {"op": "layers", "layers": [0], "factor": 0.3}),
    *(case for case in merge_cases() if case.model == "qwen3"),
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
