"""A new op or family is one file and one line of a registry; all else holds for it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
from inputs import write_auroc, write_means
from models import FAMILIES, MODELS
from oracles import assert_equivalent, assert_rounded_once
from recipes import HEADS, NEURONS, editor_of, make_sae, plan_of, sae_edit

from surgery import api, edits
from surgery.arch import families
from surgery.edits import OPS
from surgery.errors import RecipeError
from surgery.recipe import recipe_model, recipe_schema
from surgery.verify import verify

MIRROR = {"op": "mirror", "layer": 1}
TOY = "starcoder2"
STARCODER = {**MODELS["qwen2"][1], "tie_word_embeddings": True}
EDITS: dict[str, tuple[str, dict[str, Any]]] = {
    "mirror": ("", MIRROR),
    "heads": ("", {**HEADS, "factor": 0.5}),
    "heads, mean": ("", {**HEADS, "mean": {"file": "means.safetensors"}}),
    "neurons": ("", NEURONS),
    "neurons, pruned": ("", {**NEURONS, "prune": True}),
    "aura": ("", {"op": "neurons", "auroc": {"file": "auroc.csv"}, "method": "aura"}),
    "layers": ("", {"op": "layers", "layers": "all", "factor": -1.0}),
    "orthogonalize": ("blocks.1.hook_resid_post", sae_edit("orthogonalize")),
    "z_project": ("blocks.1.attn.hook_z", sae_edit("z_project")),
    "steer_bias": ("blocks.1.hook_mlp_out", sae_edit("steer_bias")),
}


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The line of the op's registry."""
    monkeypatch.setitem(edits.OPS._members, "mirror", "mirror:MirrorFields")
    recipe_model.cache_clear()
    yield
    recipe_model.cache_clear()


@pytest.fixture
def starcoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of the families' registry, and how such a model is made for tests."""
    file = Path(__file__).with_name("starcoder2.json")
    monkeypatch.setitem(families.FAMILIES, TOY, str(file))  # type: ignore[arg-type]
    monkeypatch.setitem(models.MODELS, TOY, ("Starcoder2ForCausalLM", STARCODER))


def keep_the_contract(folder: Path, base: Path, edit: dict[str, Any], hook: str = "") -> None:
    if hook:
        make_sae(folder / "sae", hook, 32)
    editor = editor_of(folder, base, [edit], untie=True)
    assert_equivalent(editor, folder / "out")
    assert_rounded_once(editor, folder / "out")
    assert verify(folder / "out", base, folder / "recipe.json").findings == ()
    recipe, delta = folder / "recipe.json", folder / "delta.safetensors"
    api.apply(recipe, base, folder / "edited", delta=delta)
    api.revert(folder / "edited", delta, folder / "back")
    for path in base.iterdir():
        assert (folder / "back" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("mirror")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_op_keeps_the_contract(
    family: str, dtype: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    assert "mirror" in OPS and "MirrorFields" in recipe_schema()["$defs"]
    keep_the_contract(tmp_path, base_of(family, dtype), MIRROR)


@pytest.mark.usefixtures("mirror", "starcoder")
@pytest.mark.parametrize("name", EDITS)
def test_a_new_family_keeps_the_contract(
    name: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of(TOY)
    write_means(tmp_path, base)
    write_auroc(tmp_path, base)
    hook, edit = EDITS[name]
    keep_the_contract(tmp_path, base, edit, hook)


def test_without_their_lines_neither_is_known(base_of: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="mirror"):
        plan_of(tmp_path, base_of("gpt2"), [MIRROR])
    assert TOY not in families.FAMILIES
