"""One case per op and family against an intervention written by hand.

The hooks of the edits find modules through the same facts as their weights do; here every module
path, head size and axis is spelled out, so that a wrong fact cannot agree with itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inputs import random, write_vector
from models import FAMILIES, make
from oracles import assert_equivalent, forward_hooks, load_model
from recipes import editor_of, make_sae, sae_edit

DECODER = "model.layers.{}"
BLOCK = {
    "gpt2": "transformer.h.{}",
    "llama": DECODER,
    "qwen3": DECODER,
    "bert": "bert.encoder.layer.{}",
}
O_PROJ = {
    "gpt2": "transformer.h.{}.attn.c_proj",
    "llama": "model.layers.{}.self_attn.o_proj",
    "qwen3": "model.layers.{}.self_attn.o_proj",
    "bert": "bert.encoder.layer.{}.attention.output.dense",
}
DOWN = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "llama": "model.layers.{}.mlp.down_proj",
    "qwen3": "model.layers.{}.mlp.down_proj",
    "bert": "bert.encoder.layer.{}.output.dense",
}
EMBEDDINGS = {
    "gpt2": ["transformer.wte", "transformer.wpe"],
    "llama": ["model.embed_tokens"],
    "qwen3": ["model.embed_tokens"],
    "bert": [f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")],
}
VALUES = {
    "gpt2": "transformer.h.{}.attn.c_attn",
    "llama": "model.layers.{}.self_attn.v_proj",
    "qwen3": "model.layers.{}.self_attn.v_proj",
    "bert": "bert.encoder.layer.{}.attention.self.value",
}
# Where the values of key-value head 1 lie in that module's output: thirds of 32 in gpt2, heads
# of 8 but for qwen3's 16; the decoders share each key-value head between two heads.
HEAD_1_VALUES = {
    "gpt2": slice(64 + 8, 64 + 16),
    "llama": slice(8, 16),
    "qwen3": slice(16, 32),
    "bert": slice(8, 16),
}
HEADS_OF_1 = {"gpt2": [1], "llama": [2, 3], "qwen3": [2, 3], "bert": [1]}


def scaled(where: Any, factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[..., where] *= factor
        return x

    return change


def projected(rows: np.ndarray[Any, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """x less its part in the span of `rows`, by the pseudo-inverse."""
    projector = torch.from_numpy(np.linalg.pinv(rows) @ rows).float()
    return lambda x: x - x @ projector


def hooked(**hooks: Any) -> Callable[[Any], AbstractContextManager[None]]:
    return lambda model: forward_hooks(model, **hooks)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_scaled_as_its_values_are(
    family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    edit = {"op": "heads", "heads": [f"L1H{h}" for h in HEADS_OF_1[family]], "factor": 0.25}
    editor = editor_of(tmp_path, base_of(family), [edit])
    values = {VALUES[family].format(1): scaled(HEAD_1_VALUES[family], 0.25)}
    assert_equivalent(editor, tmp_path / "out", hooked(outputs=values))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [0, 3])
def test_a_head_is_zeroed_where_the_config_puts_it(
    family: str, head: int, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    size = 16 if family == "qwen3" else 8
    editor = editor_of(tmp_path, base_of(family), [{"op": "heads", "heads": [f"L0H{head}"]}])
    where = slice(head * size, (head + 1) * size)
    z = {O_PROJ[family].format(0): scaled(where, 0.0)}
    assert_equivalent(editor, tmp_path / "out", hooked(inputs=z))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_neuron_is_scaled_after_its_activation(
    family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    edit = {"op": "neurons", "neurons": ["L1N5", "L1N47"], "factor": -3.0}
    editor = editor_of(tmp_path, base_of(family), [edit])
    neurons = {DOWN[family].format(1): scaled([5, 47], -3.0)}
    assert_equivalent(editor, tmp_path / "out", hooked(inputs=neurons))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_write_to_the_stream_loses_the_features(
    family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    rows = make_sae(tmp_path / "sae", "blocks.0.hook_resid_post", 32)[[2, 5, 6]]
    edit = sae_edit("orthogonalize", (2, 5, 6), approximate=family == "bert")
    editor = editor_of(tmp_path, base_of(family), [edit], untie=True)
    blocks = [path[family].format(layer) for path in (O_PROJ, DOWN) for layer in (0, 1)]
    writers = dict.fromkeys([*EMBEDDINGS[family], *blocks], projected(rows))
    assert_equivalent(editor, tmp_path / "out", hooked(outputs=writers))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_projection_stops_reading_the_features(
    family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    width = 64 if family == "qwen3" else 32
    rows = make_sae(tmp_path / "sae", "blocks.1.attn.hook_z", width)[[0, 9]]
    editor = editor_of(tmp_path, base_of(family), [sae_edit("z_project", (0, 9))])
    z = {O_PROJ[family].format(1): projected(rows)}
    assert_equivalent(editor, tmp_path / "out", hooked(inputs=z))


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"])
def test_the_stream_between_blocks_is_shifted(
    family: str, hook: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    vector = make_sae(tmp_path / "sae", hook, 32)[[4, 5]].sum(axis=0) * 2.5
    edit = sae_edit("steer_bias", (4, 5), strength=2.5)
    editor = editor_of(tmp_path, base_of(family), [edit])
    shift = {BLOCK[family].format(1): lambda x: x + torch.from_numpy(vector).float()}
    assert_equivalent(editor, tmp_path / "out", hooked(inputs=shift))


MLP_NORM = {
    "gpt2": "transformer.h.0.ln_2",
    "llama": "model.layers.0.post_attention_layernorm",
    "qwen3": "model.layers.0.post_attention_layernorm",
}


@pytest.mark.parametrize("family", MLP_NORM)
def test_the_middle_of_a_decoder_block_is_what_its_second_norm_and_the_next_block_see(
    family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    vector = make_sae(tmp_path / "sae", "blocks.0.hook_resid_mid", 32)[3]
    editor = editor_of(tmp_path, base_of(family), [sae_edit("steer_bias", (3,))])
    places = (MLP_NORM[family], BLOCK[family].format(1))
    shift = dict.fromkeys(places, lambda x: x + torch.from_numpy(vector).float())
    assert_equivalent(editor, tmp_path / "out", hooked(inputs=shift))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("hook", "paths"), [("hook_attn_out", O_PROJ), ("hook_mlp_out", DOWN)])
def test_what_attention_and_mlp_add_is_shifted(
    family: str, hook: str, paths: dict[str, str], base_of: Callable[..., Path], tmp_path: Path
) -> None:
    if (family, hook) == ("qwen3", "hook_mlp_out"):
        return  # it has no bias there
    vector = make_sae(tmp_path / "sae", f"blocks.1.{hook}", 32)[3]
    editor = editor_of(tmp_path, base_of(family), [sae_edit("steer_bias", (3,))])
    shift = {paths[family].format(1): lambda x: x + torch.from_numpy(vector).float()}
    assert_equivalent(editor, tmp_path / "out", hooked(outputs=shift))


@pytest.mark.parametrize("family", FAMILIES)
def test_head_outputs_are_shifted_before_their_projection(
    family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    width = 64 if family == "qwen3" else 32
    vector = make_sae(tmp_path / "sae", "blocks.0.attn.hook_z", width)[3]
    editor = editor_of(tmp_path, base_of(family), [sae_edit("steer_bias", (3,))])
    shift = {O_PROJ[family].format(0): lambda z: z + torch.from_numpy(vector).float()}
    assert_equivalent(editor, tmp_path / "out", hooked(inputs=shift))


def test_the_middle_of_a_bert_block_is_behind_its_norm(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    vector = make_sae(tmp_path / "sae", "blocks.0.hook_resid_mid", 32)[3]
    editor = editor_of(tmp_path, base_of("bert"), [sae_edit("steer_bias", (3,))])
    path = "bert.encoder.layer.0.attention.output"
    shift = {path: lambda x: x + torch.from_numpy(vector).float()}
    assert_equivalent(editor, tmp_path / "out", hooked(outputs=shift))


def test_several_edits_act_together(base_of: Callable[..., Path], tmp_path: Path) -> None:
    rows = make_sae(tmp_path / "sae", "blocks.0.hook_attn_out", 32)[[1]]
    edits = [
        {"op": "heads", "heads": ["L0H0", "L0H1"], "factor": 0.5},
        sae_edit("orthogonalize", (1,), layers=[0]),
        {"op": "neurons", "neurons": ["L0N7"], "factor": 4.0},
    ]
    editor = editor_of(tmp_path, base_of("llama"), edits)
    o_proj, down = O_PROJ["llama"].format(0), DOWN["llama"].format(0)
    hooks = hooked(
        inputs={o_proj: scaled(slice(0, 16), 0.5), down: scaled([7], 4.0)},
        outputs={o_proj: projected(rows), down: projected(rows)},
    )
    assert_equivalent(editor, tmp_path / "out", hooks)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", ["all", [1]])
def test_every_write_to_the_stream_loses_the_direction(
    family: str, layers: Any, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    write_vector(tmp_path, base_of(family))
    edit = {
        "op": "direction",
        "vector": {"file": "d.safetensors", "key": "d"},
        "layers": layers,
        "approximate": family == "bert",
    }
    editor = editor_of(tmp_path, base_of(family), [edit], untie=True)
    chosen = (0, 1) if layers == "all" else (1,)
    blocks = [path[family].format(layer) for path in (O_PROJ, DOWN) for layer in chosen]
    outside = EMBEDDINGS[family] if layers == "all" else []
    writers = dict.fromkeys([*outside, *blocks], projected(random(32, size=3.0)[None]))
    assert_equivalent(editor, tmp_path / "out", hooked(outputs=writers))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_what_a_block_writes_is_scaled(
    part: str, family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    edit = {"op": "layers", "layers": [1], "part": part, "factor": 0.25}
    editor = editor_of(tmp_path, base_of(family), [edit])
    path = (O_PROJ if part == "attn" else DOWN)[family].format(1)
    assert_equivalent(editor, tmp_path / "out", hooked(outputs={path: lambda y: 0.25 * y}))


HEADS_OF_MODELS = {**dict.fromkeys(FAMILIES, "lm_head"), "bert": "cls.predictions.decoder"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_state_loses_components_of_the_head(
    family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    edit = {"op": "lm_head_spectrum", "components": [1, 2], "factor": 0.0}
    editor = editor_of(tmp_path, base_of(family), [edit], untie=True)
    head = HEADS_OF_MODELS[family]
    weight = load_model(base_of(family)).get_submodule(head).weight.detach().double().numpy()
    rows = np.linalg.svd(weight)[2][[1, 2]]
    assert_equivalent(editor, tmp_path / "out", hooked(inputs={head: projected(rows)}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_matrix_gives_the_mean_of_what_both_give(
    family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    make(family, tmp_path / "other", seed=1)
    path = DOWN[family].format(0)
    edit = {
        "op": "merge",
        "with": [{"model": "other", "weight": 0.4}],
        "include": [f"{path}.*"],
    }
    editor = editor_of(tmp_path, base_of(family), [edit])
    other, seen = load_model(tmp_path / "other").get_submodule(path), []

    def read(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x

    hooks = hooked(inputs={path: read}, outputs={path: lambda y: 0.6 * y + 0.4 * other(seen.pop())})
    assert_equivalent(editor, tmp_path / "out", hooks)
