"""Every op on every family: the edited weights are the intervention, or the op says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from inputs import (
    SQUARE,
    write_adapter,
    write_box,
    write_factors,
    write_partners,
    write_patch,
    write_vector,
)
from models import FAMILIES
from oracles import assert_equivalent, assert_rounded_once, edited_logits, load_model, logits
from recipes import HEADS, NEURONS, apply_edits, editor_of, make_sae, plan_of, sae_edit

from surgery.edits import OPS
from surgery.errors import EditError
from surgery.verify import verify

WIDTH = 32
Z_WIDTH = {"gpt2": 32, "llama": 32, "qwen3": 64, "bert": 32}
HOOKS = (
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_resid_post",
    "attn.hook_z",
)
QWEN3_BIASES = ("hook_attn_out", "hook_resid_mid", "attn.hook_z")


@dataclass(frozen=True)
class Case:
    """One edit of one family; `refused` is what the error says where it has no meaning."""

    family: str
    edit: dict[str, Any]
    hook: str = ""
    refused: str = ""
    untie: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    files: Callable[[Path, Path], None] | None = None

    def __str__(self) -> str:
        op = self.edit.get("patch", self.edit["op"])
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
        }
        rest = [f"{k}={v}" for k, v in self.edit.items() if k not in keys]
        return "-".join([self.family, op, self.hook.replace("blocks.", ""), *rest])

    def prepare(self, folder: Path, base: Path) -> dict[str, Any]:
        """Writes the files the edit reads for the model `base`; returns the recipe's fields."""
        if self.files is not None:
            self.files(folder, base)
        if self.hook:
            width = Z_WIDTH[self.family] if self.hook.endswith("hook_z") else WIDTH
            make_sae(folder / "sae", self.hook, width)
        return {"edits": [self.edit], "untie": self.untie}


def scaling_cases() -> Iterator[Case]:
    for family in FAMILIES:
        for edit in (HEADS, NEURONS):
            for factor in (0.0, 0.5, -2.0):
                yield Case(family, {**edit, "factor": factor})


def projection_cases() -> Iterator[Case]:
    post, z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
    for family in FAMILIES:
        allow = {"approximate": True} if family == "bert" else {}
        for features, more in (((1, 4, 7), {}), ((2,), {"strength": 0.5, "center": True})):
            edit = sae_edit("orthogonalize", features, **allow, **more)
            yield Case(family, edit, post, untie=True)
        for layers in ([1], "0-1"):
            edit = sae_edit("orthogonalize", layers=layers, **allow)
            yield Case(family, edit, "blocks.0.hook_mlp_out")
        yield Case(family, sae_edit("z_project", strength=0.75), z)
        yield Case(family, sae_edit("z_project", (3,)), "blocks.0.attn.hook_z")
        yield Case(family, sae_edit("z_project"), post, refused="hooks 'hook_resid_post'")
        yield Case(family, sae_edit("orthogonalize", **allow), z, refused="hooks 'attn.hook_z'")
    edit = sae_edit("orthogonalize")
    yield Case("bert", edit, post, untie=True, refused="normalises after each write")


def steering_cases() -> Iterator[Case]:
    for family in FAMILIES:
        for hook in HOOKS:
            for layer in (0, 1):
                yield Case(
                    family,
                    sae_edit("steer_bias", strength=3.0),
                    f"blocks.{layer}.{hook}",
                    refused=steering_refusal(family, hook, layer),
                )
        yield Case(
            family,
            sae_edit("steer_bias"),
            "blocks.0.hook_normalized",
            refused="hooks 'hook_normalized'",
        )


def steering_refusal(family: str, hook: str, layer: int) -> str:
    """Why no bias can hold a vector there, by hand: qwen3 has no MLP biases, and what enters the
    first block of a decoder is an embedding without a bias."""
    if family == "qwen3" and hook not in QWEN3_BIASES:
        return f"hooks '{hook}'; steer_bias on qwen3 needs one of"
    first = hook == "hook_resid_pre" and layer == 0
    return f"{family} has no bias at blocks.0" if first and family != "bert" else ""


def written_cases() -> Iterator[Case]:
    for family in FAMILIES:
        at = {SQUARE[family].format(1): [3, 5]}
        patch = {"op": "tensor", "file": "patch.safetensors"}
        yield Case(family, patch, files=write_patch, untie=True)
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


def spectrum_cases() -> Iterator[Case]:
    head = {"op": "head_spectrum", "heads": ["L0H1", "L1H0", "L1H3"], "components": [0, 2]}
    qk = {**head, "circuit": "qk", "components": [0]}
    refused = {"llama": "turns queries and keys", "qwen3": "normalises its queries"}
    for family in FAMILIES:
        output = {"op": "lm_head_spectrum", "components": [0, 3]}
        for factor in (0.0, 0.5, -1.0):
            yield Case(family, {**output, "factor": factor}, untie=True)
            yield Case(family, {**head, "factor": factor})
        yield Case(family, {**qk, "factor": -2.0}, refused=refused.get(family, ""))
        norm = "bert has no norm before attention" if family == "bert" else ""
        yield Case(family, {**head, "fold_norm": True}, refused=norm)


CASES = [
    *scaling_cases(),
    *projection_cases(),
    *steering_cases(),
    *written_cases(),
    *direction_cases(),
    *layer_cases(),
    *merge_cases(),
    *spectrum_cases(),
]
MEANT = [case for case in CASES if not case.refused]
REFUSED = [case for case in CASES if case.refused]


def test_every_registered_op_is_tried_on_every_family() -> None:
    tried = {(case.edit["op"], case.family) for case in MEANT}
    assert tried == {(op, family) for op in OPS for family in FAMILIES}


@pytest.mark.parametrize("case", MEANT, ids=str)
def test_edited_weights_do_what_the_hook_does(
    case: Case, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    fields = case.prepare(tmp_path, base_of(case.family))
    editor = editor_of(tmp_path, base_of(case.family), **fields)
    assert_equivalent(editor, tmp_path / "out")
    assert_rounded_once(editor, tmp_path / "out")
    recipe = tmp_path / "recipe.json"
    assert verify(tmp_path / "out", base_of(case.family), recipe).findings == ()


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_an_edit_without_meaning_says_why(
    case: Case, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    fields = case.prepare(tmp_path, base_of(case.family))
    with pytest.raises(EditError) as caught:
        plan_of(tmp_path, base_of(case.family), **fields)
    assert case.refused in str(caught.value)
    assert "@ edits[0]" in str(caught.value)


BY_DTYPE = [
    Case("gpt2", {**HEADS, "factor": 0.3}),
    Case("bert", {**NEURONS, "factor": 0.3}),
    Case("llama", sae_edit("orthogonalize", strength=0.9), "blocks.1.hook_resid_post"),
    Case("qwen3", sae_edit("z_project"), "blocks.1.attn.hook_z"),
    Case("llama", sae_edit("steer_bias"), "blocks.0.hook_mlp_out"),
    Case("gpt2", sae_edit("steer_bias"), "blocks.0.attn.hook_z"),
    *(case for case in written_cases() if case.family in ("gpt2", "qwen3")),
    *(case for case in direction_cases() if case.family in ("gpt2", "llama")),
    Case("bert", {"op": "layers", "layers": [0], "factor": 0.3}),
    *(case for case in merge_cases() if case.family == "qwen3"),
    *(case for case in spectrum_cases() if case.family == "gpt2"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("case", BY_DTYPE, ids=str)
def test_it_holds_in_every_storage_type(
    case: Case, dtype: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    fields = case.prepare(tmp_path, base_of(case.family, dtype))
    editor = editor_of(tmp_path, base_of(case.family, dtype), **fields)
    assert_equivalent(editor, tmp_path / "out")
    assert_rounded_once(editor, tmp_path / "out")


ADDING = [
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
]


@pytest.mark.parametrize("case", ADDING, ids=str)
def test_added_tensors_load_in_stock_transformers(
    case: Case, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Storage is float32, so what stock transformers loads is what was computed."""
    fields = case.prepare(tmp_path, base_of(case.family))
    editor = editor_of(tmp_path, base_of(case.family), **fields)
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
