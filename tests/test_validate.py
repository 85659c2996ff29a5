"""Recipes of trained models through the four corners: those beside them, and one of every op."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from corners import Here
from inputs import (
    write_adapter,
    write_auroc,
    write_factors,
    write_means,
    write_patch,
    write_vector,
)
from recipes import write_recipe

from surgery import api
from surgery.edits import OPS
from surgery.recipe import load_recipe
from surgery.report import Report

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
RECIPES = {
    f"{path.parent.name}/{path.stem}": path
    for path in sorted(FIXTURES.glob("*/*.yaml"))
    if not path.name.endswith(".policy.yaml")
}
TARGET = {"sae-resid": "forget"}
"""The stimuli a recipe should change, where they are not those of its model."""

WRITERS = (
    write_adapter, write_auroc, write_factors, write_means, write_patch, write_vector,
)  # fmt: skip
"""Of every file that an edit below reads."""

GPT2, LLAMA, TUNED = "capitals-gpt2", "polyglot-llama", "polyglot-llama-tuned"
NEURONS = [f"L{layer}N{n}" for layer in range(3) for n in (0, 40, 41)]
GROUPS = [f"L{layer}H{head}" for layer in range(3) for head in (0, 1)]
HEADS = {"op": "heads", "heads": ["L0H2", "L3H0"]}
MEAN = {"file": "means.safetensors"}
AUROC = {"op": "neurons", "auroc": {"file": "auroc.csv"}}
FEATURE = {"op": "sae", "sae": str(FIXTURES / GPT2 / "sae-resid"), "features": [253]}
DIRECTION = {"op": "direction", "vector": {"file": "d.safetensors", "key": "d"}}
OUTPUT = {"op": "lm_head_spectrum", "components": [0, 5], "factor": 0.1}
SPECTRUM = {"op": "head_spectrum", "heads": ["L0H2", "L1H1"], "components": [0, 3]}
LORA = {"op": "lora", "adapter": "adapter", "scale": 0.1}


def mixed(weight: float, **fields: Any) -> dict[str, Any]:
    return {"op": "merge", "with": [{"model": str(FIXTURES / TUNED), "weight": weight}], **fields}


EDITS: dict[str, tuple[str, dict[str, Any]]] = {
    "direction": (GPT2, DIRECTION),
    "direction, norms kept": (LLAMA, {**DIRECTION, "keep_norms": "columns"}),
    "layers": (GPT2, {"op": "layers", "layers": [2], "factor": 0.5}),
    "layers, one MLP gone": (LLAMA, {"op": "layers", "layers": [1], "part": "mlp"}),
    "output head": (GPT2, OUTPUT),
    "output head, bf16": (LLAMA, OUTPUT),
    "head circuit, ov": (LLAMA, SPECTRUM),
    "head circuit, qk": (GPT2, {**SPECTRUM, "circuit": "qk", "factor": 0.5}),
    "merge, linear": (LLAMA, mixed(0.5)),
    "merge, ties": (LLAMA, mixed(1.0, method="ties", density=0.2)),
    "merge, slerp": (LLAMA, mixed(0.3, method="slerp")),
    "lora": (GPT2, LORA),
    "lora, bf16": (LLAMA, LORA),
    "low rank": (GPT2, {"op": "low_rank", "file": "uv.safetensors", "scale": 0.1}),
    "tensor": (LLAMA, {"op": "tensor", "file": "patch.safetensors"}),
    "mean of heads": (GPT2, {**HEADS, "mean": MEAN}),
    "mean of neurons, bf16": (
        LLAMA,
        {"op": "neurons", "neurons": NEURONS, "mean": {**MEAN, "key": "neurons"}},
    ),
    "AurA": (GPT2, {**AUROC, "method": "aura"}),
    "Det0, bf16": (LLAMA, {**AUROC, "method": "det0", "on": "up"}),
    "pruned key-value groups": (LLAMA, {"op": "heads", "heads": GROUPS, "prune": True}),
    "pruned neurons": (
        GPT2,
        {"op": "neurons", "neurons": [*NEURONS, "L3N1", "L3N2", "L3N3"], "prune": True},
    ),
    "steered": (GPT2, {**FEATURE, "patch": "steer_bias", "strength": 4.0}),
    "rank one": (GPT2, {**FEATURE, "patch": "rank1", "strength": 0.2}),
}


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Children in this process; each corner of torch runs once."""
    with Here(tmp_path_factory.mktemp("corners")).installed():
        yield


def assert_passes(report: Report) -> None:
    """By its policy; and the edit was converted as well as the original, and does something."""
    assert (report.verdict, list(report.findings)) == ("pass", [])
    assert {row.edge for row in report.conversion} == {"C_o", "C_e"}
    limit = report.policy.conversion.max_noise_ratio
    for row in report.conversion:
        assert max(row.ratio_max, row.ratio_l2, row.ratio_position) <= limit, row
    assert all(row.effect > 100 * row.noise for row in report.interaction)


def case(name: str) -> Any:
    """What the demo runs as well, which another test makes, is of the campaign."""
    demo = ("capitals-gpt2/remember", "capitals-gpt2/sae-z", "polyglot-llama/unconfuse")
    return pytest.param(name, marks=pytest.mark.campaign) if name in demo else name


@pytest.mark.parametrize("name", [case(name) for name in RECIPES])
def test_every_recipe_beside_a_model_passes_its_policy(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    policy = recipe.with_suffix(".policy.yaml")
    sets = (TARGET.get(recipe.stem, "target"), "preserve") if policy.exists() else ()
    report = api.validate(
        recipe,
        recipe.parent,
        tmp_path / "out",
        policy=policy if policy.exists() else None,
        stimuli=[recipe.parent / "stimuli" / f"{kind}.jsonl" for kind in sets],
    )
    assert_passes(report)
    assert api.verify(tmp_path / "out/edited", base=recipe.parent, recipe=recipe).ok


def test_every_op_is_tried_on_a_trained_model() -> None:
    written = [edit["op"] for _, edit in EDITS.values()]
    beside = [fields.op for path in RECIPES.values() for fields in load_recipe(path).edits]
    assert {*written, *beside} == set(OPS)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_a_trained_model_is_converted_within_noise(name: str, tmp_path: Path) -> None:
    fixture, edit = EDITS[name]
    model = FIXTURES / fixture
    for write in WRITERS:
        write(tmp_path, model)
    recipe = write_recipe(tmp_path, [edit])
    assert_passes(api.validate(recipe, model, tmp_path / "out", allow_outside=True))
