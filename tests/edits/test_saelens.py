"""SAELens folders: the right rows of the right autoencoder, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes import HEADS, make_sae, plan_of, sae_edit
from safetensors_files import tiled

from surgery.edits.autoencoders.interface import Autoencoder, Folder
from surgery.edits.autoencoders.saelens import SaeLens
from surgery.errors import CheckpointError, EditError, InputError
from surgery.recipe import RecipeFolder, parse_recipe

HOOK = "blocks.1.hook_resid_post"


def opened(folder: Path) -> Autoencoder:
    recipe = parse_recipe(json.dumps({"schema": 1, "edits": [HEADS]}), "recipe", folder.parent)
    return SaeLens().read(Folder(folder.name, RecipeFolder(recipe), pickle=False))


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
def test_rows_are_read_in_every_float_type(dtype: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    decoder = torch.from_numpy(make_sae(tmp_path, HOOK, 32)).to(getattr(torch, dtype))
    save_file(
        {"W_enc": decoder.T.contiguous(), "W_dec": decoder}, tmp_path / "sae_weights.safetensors"
    )
    rows = opened(tmp_path).decoder_rows([7, 0])
    assert (rows == decoder[[7, 0]].double().numpy()).all()


@pytest.mark.parametrize(
    "config", [{"metadata": {"hook_name": HOOK}}, {"hook_name": HOOK}, {"hook_point": HOOK}]
)
def test_all_places_of_the_hook_name_are_read(config: dict[str, Any], tmp_path: Path) -> None:
    make_sae(tmp_path, "x", 32)
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert opened(tmp_path).hook == HOOK


@pytest.mark.parametrize(
    "config",
    [
        [], {}, {"hook_name": 7}, {"hook_name": "blocks.x.hook"}, {"hook_name": "../../x"},
        {"hook_name": "blocks.9999999.hook_resid_post"}, {"hook_name": HOOK, "d_in": 31},
        {"hook_name": HOOK, "d_sae": ["\n" * 999]}, {"metadata": [], "hook_name": None},
        {"hook_name": HOOK, "architecture": "transcoder"},
    ],
)  # fmt: skip
def test_a_malformed_config_is_refused_in_one_line(
    config: Any, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    make_sae(tmp_path / "sae", HOOK, 32)
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        plan_of(tmp_path, base_of("llama"), [sae_edit("orthogonalize")])
    assert (
        "cfg.json" in str(caught.value)
        or "names no hook" in str(caught.value)
        or ("is no hook point of llama" in str(caught.value))
        or ("is a transcoder" in str(caught.value))
    )
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    "tensors", [{}, {"W_dec": ("F32", (12,))}, {"W_dec": ("I32", (12, 32))}, {"w": ("F32", (2, 2))}]
)
def test_weights_without_a_decoder_are_refused(tensors: dict[str, Any], tmp_path: Path) -> None:
    make_sae(tmp_path, HOOK, 32)
    (tmp_path / "sae_weights.safetensors").write_bytes(tiled(tensors))
    with pytest.raises(CheckpointError):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("row", "center", "said"),
    [
        (0.0, False, "decoder row 4 has norm 0.0"),
        (np.nan, False, "decoder row 4 has norm nan"),
        (np.inf, False, "decoder row 4 has norm inf"),
        (0.7, True, "a decoder row is constant"),
    ],
)
def test_a_row_without_a_direction_is_refused(
    row: float, center: bool, said: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    decoder = make_sae(tmp_path / "sae", HOOK, 32).astype(np.float32)
    decoder[4] = row
    save_file({"W_dec": decoder}, tmp_path / "sae" / "sae_weights.safetensors")
    edit = sae_edit("orthogonalize", (3, 4), center=center)
    with pytest.raises(EditError, match=said):
        plan_of(tmp_path, base_of("llama"), [edit])


@pytest.mark.parametrize(
    ("hook", "width", "patch", "config", "said"),
    [
        (HOOK, 64, "orthogonalize", {}, "has width 64; this model has 32"),
        ("blocks.2.hook_resid_post", 32, "orthogonalize", {}, "layers 0 to 1"),
        ("blocks.1.attn.hook_z", 32, "z_project", {}, "has width 32; this model has 64"),
        ("blocks.1.attn.hook_z", 64, "orthogonalize", {}, "needs one of hook_resid_pre"),
        ("blocks.1.ln2.hook_normalized", 32, "orthogonalize", {}, "needs one of"),
        ("blocks.1.hook_attn_out", 32, "steer_bias", {"normalize_activations": "layer_norm"},
         "not in the model's units"),
        (HOOK, 32, "rank1", {"normalize_activations": "expected_average_only_in"},
         "not in the model's units"),
    ],
)  # fmt: skip
def test_an_autoencoder_of_another_model_is_refused(
    hook: str,
    width: int,
    patch: str,
    config: dict[str, Any],
    said: str,
    base_of: Callable[..., Path],
    tmp_path: Path,
) -> None:
    make_sae(tmp_path / "sae", hook, width, **config)
    with pytest.raises(EditError, match=said):
        plan_of(tmp_path, base_of("qwen3"), [sae_edit(patch)], untie=True)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (sae_edit("orthogonalize", (1, 1)), "a feature is named twice"),
        (sae_edit("orthogonalize", (12,)), "feature 12 is out of range 0 to 11"),
        (sae_edit("orthogonalize", layers=[]), "name at least one layer"),
        (sae_edit("orthogonalize", layers=[2]), "layers 0 to 1"),
        (sae_edit("orthogonalize", layers="0-2"), "layers 0 to 1"),
        (sae_edit("steer_bias", layers=[0]), "layers and approximate have no meaning"),
        (sae_edit("z_project", approximate=True), "layers and approximate have no meaning"),
        ({**sae_edit("orthogonalize"), "sae": "nowhere"}, "nowhere': holds no autoencoder"),
        ({**sae_edit("orthogonalize"), "sae": "../sae"}, "leaves the recipe's folder"),
    ],
)
def test_fields_that_mean_nothing_are_refused(
    edit: dict[str, Any], said: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    make_sae(tmp_path / "sae", HOOK, 32)
    with pytest.raises(InputError, match=said):
        plan_of(tmp_path, base_of("llama"), [edit])
