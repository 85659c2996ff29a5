"""`sae` with `append_neuron`: neurons that are features."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from features import EDIT, FLAGGED, HOOK, RELU, D, K, N, relu, write_sae
from models import MODELS, config_of, family_of
from oracles import (
    assert_equivalent,
    assert_rounded_once,
    edited_logits,
    forward_hooks,
    load_model,
    logits,
)
from recipes import apply_edits, editor_of, make_sae, plan_of, sae_edit, stored, write_recipe

from surgery import api
from surgery.arch import identify
from surgery.checkpoint import SINGLE, Checkpoint
from surgery.edits.autoencoders.hooks import MLP_INPUT, Point, parse
from surgery.errors import EditError, InputError
from surgery.verify import verify


@pytest.mark.parametrize("model", RELU)
def test_a_neuron_is_the_feature(model: str, base_of: Callable[..., Path], tmp_path: Path) -> None:
    base, out = relu(model, base_of), tmp_path / "out"
    write_sae(tmp_path / "sae")
    editor = editor_of(tmp_path, base, [EDIT])
    assert_equivalent(editor, out)
    assert_rounded_once(editor, out)
    assert verify(out, base, tmp_path / "recipe.json").findings == ()
    # Storage is float32: what stock transformers loads is what was computed.
    assert (logits(load_model(out)) == edited_logits(editor, tmp_path / "again")).all()
    arch = identify(Checkpoint.open(out))
    assert arch.sizes["mlp_width"] == identify(Checkpoint.open(base)).sizes["mlp_width"] + K
    [changed] = {
        key for key in config_of(out) if config_of(out)[key] != config_of(base).get(key)
    } - {FLAGGED.get(model)}
    assert changed == arch.config_keys("mlp_width")[0]


def by_hand(
    sae: dict[str, Any], features: tuple[int, ...], *, scale: float = 1, centered: bool = False
) -> Callable[[Any], Any]:
    """Our own hand on OPT: what the autoencoder would give of the features, into the MLP's output.

    The frame in `autoencoders/interface.py`: f = relu(s·x·W_enc + b_enc), x̂ = f·W_dec / s.
    """
    import torch

    t = {name: torch.from_numpy(np.asarray(value, np.float32)) for name, value in sae.items()}
    read: list[Any] = []

    def enters(x: Any) -> Any:
        read.append(x)
        return x

    def leaves(y: Any) -> Any:
        seen = scale * read.pop() - (t["b_dec"] if centered else 0)
        f = torch.relu(seen @ t["W_enc"] + t["b_enc"])[..., list(features)]
        return y + 0.2 * f @ t["W_dec"][list(features)] / scale

    layer = "model.decoder.layers.1"
    return lambda model: forward_hooks(
        model, outputs={f"{layer}.fc2": leaves}, inputs={f"{layer}.fc1": enters}
    )


@pytest.mark.parametrize("centered", [True, False])
def test_the_encoder_sees_what_saelens_gives_it(
    centered: bool, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    sae = write_sae(tmp_path / "sae", apply_b_dec_to_input=centered)
    editor = editor_of(tmp_path, base_of("opt"), [EDIT])
    assert_equivalent(editor, tmp_path / "out", by_hand(sae, (1, 4, 7), centered=centered))


def test_a_scale_of_the_input_is_undone(base_of: Callable[..., Path], tmp_path: Path) -> None:
    """Llama Scope's √d over the mean norm, once before the encoder and once after the decoder."""
    from safetensors.numpy import save_file

    sae = write_sae(tmp_path / "other")
    folder = tmp_path / "sae"
    (folder / "checkpoints").mkdir(parents=True)
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
    tensors = {name: np.ascontiguousarray(sae[own].T) for name, own in names.items()}
    tensors["decoder.bias"] = sae["b_dec"]
    save_file(tensors, folder / "checkpoints" / "final.safetensors")
    norms = {"in": 2.5, "out": 2.5}
    config = {"hook_point_in": HOOK, "hook_point_out": HOOK, "act_fn": "relu"}
    config |= {"d_model": D, "d_sae": N, "dataset_average_activation_norm": norms}
    (folder / "hyperparams.json").write_text(json.dumps(config))
    editor = editor_of(tmp_path, base_of("opt"), [EDIT])
    hooked = by_hand(sae, (1, 4, 7), scale=math.sqrt(D) / 2.5)
    assert_equivalent(editor, tmp_path / "out", hooked)


@pytest.mark.parametrize("place", ["top", "metadata"])
def test_a_transcoder_writes_what_the_mlp_writes(
    place: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Its b_dec is of what it writes, and never subtracted, whatever apply_b_dec_to_input says."""
    out = {"hook_name_out": "blocks.1.hook_mlp_out"}
    config = out if place == "top" else {"metadata": {"hook_name": HOOK, **out}}
    config |= {"architecture": "transcoder", "apply_b_dec_to_input": True}
    sae = write_sae(tmp_path / "sae", **config)
    editor = editor_of(tmp_path, base_of("opt"), [EDIT])
    assert_equivalent(editor, tmp_path / "out", by_hand(sae, (1, 4, 7)))
    with pytest.raises(EditError, match="is a transcoder"):
        plan_of(tmp_path, base_of("opt"), [sae_edit("rank1")])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hook_name_out": "blocks.0.hook_mlp_out"}, r"must write blocks\.1\.hook_mlp_out"),
        ({"hook_name_out": "blocks.1.hook_resid_post"}, "reads blocks.1.mlp.input and writes"),
        ({}, "writes ''; a transcoder whose"),
        ({"architecture": "skip_transcoder"}, "is a transcoder"),
        ({"architecture": "jumprelu_transcoder", "hook_name_out": "blocks.1.hook_mlp_out"},
         "gates neurons by relu and not, as these features are, by jumprelu"),
    ],
)  # fmt: skip
def test_a_transcoder_of_anything_else_is_refused(
    config: dict[str, Any], said: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    write_sae(tmp_path / "sae", **{"architecture": "transcoder", **config})
    with pytest.raises(EditError, match=said):
        plan_of(tmp_path, base_of("opt"), [EDIT])


@pytest.mark.parametrize("model", RELU)
def test_the_name_transformer_lens_has_for_what_an_mlp_reads(
    model: str, base_of: Callable[..., Path]
) -> None:
    """An RMS norm's hook lies before its weight there, so that no name of it is the MLP's input."""
    arch = identify(Checkpoint.open(relu(model, base_of)))
    first = model in (
        "gptj",
        "falcon",
        "falcon-biased",
        "falcon-one-norm",
        "bert",
        "roberta",
        "distilbert",
    )
    right = {"ln1": first, "ln2": not first}
    for norm, means in right.items():
        means &= arch.facts.norm == "layer"
        name = f"{norm}.hook_normalized"
        assert parse(f"blocks.1.{name}", arch) == Point(1, MLP_INPUT if means else name)
    assert parse(HOOK, arch) == Point(1, MLP_INPUT)


def test_a_feature_without_a_bias_needs_none(base_of: Callable[..., Path], tmp_path: Path) -> None:
    """In a plain MLP: no flag is set that would turn biases on."""
    base = relu("falcon", base_of)
    make_sae(tmp_path / "sae", HOOK, D, apply_b_dec_to_input=False)
    editor = editor_of(tmp_path, base, [EDIT])
    assert editor.plan.config == {"ffn_hidden_size": 51}
    assert editor.plan.added == ()
    assert_equivalent(editor, tmp_path / "out")


@pytest.mark.parametrize("model", ["opt", "opt-unbiased"])
def test_a_strength_of_zero_appends_nothing(
    model: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    write_sae(tmp_path / "sae")
    output = apply_edits(tmp_path, base_of(model), [{**EDIT, "strength": 0.0}])
    assert (output / SINGLE).read_bytes() == (base_of(model) / SINGLE).read_bytes()
    assert config_of(output) == config_of(base_of(model))


def test_later_edits_see_the_neurons_and_earlier_ones_zeros(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Written features are projected out of by a later edit, and not by an earlier one."""
    sae = write_sae(tmp_path / "sae")
    shutil.copytree(tmp_path / "sae", tmp_path / "stream")
    (tmp_path / "stream" / "cfg.json").write_text('{"hook_name": "blocks.1.hook_resid_post"}')
    away = {**sae_edit("orthogonalize", (1, 4, 7), layers=[1]), "sae": "stream"}
    name, left = "model.decoder.layers.1.fc2.weight", []
    for number, edits in enumerate(([EDIT, away], [away, EDIT])):
        with pytest.raises(InputError, match="both change"):
            plan_of(tmp_path, base_of("opt"), edits)
        recipe = write_recipe(tmp_path, edits, allow_overlap=True)
        output = api.apply(recipe, base_of("opt"), tmp_path / str(number)).output
        left.append(stored(output, name)[:, -K:])
    assert np.abs(left[0]).max() < 1e-6
    np.testing.assert_allclose(left[1], 0.2 * sae["W_dec"][[1, 4, 7]].T, rtol=1e-6)


@pytest.mark.parametrize("model", [m for m in MODELS if family_of(m) not in map(family_of, RELU)])
def test_relu_alone_is_not_enough(model: str, base_of: Callable[..., Path], tmp_path: Path) -> None:
    """A gate alone needs a bias beside it, experts are no MLP, and a width needs a field."""
    key = {"gemma2": "hidden_activation", "gemma3_text": "hidden_activation"}.get(
        model, "hidden_act"
    )
    base = tmp_path / "base"
    shutil.copytree(base_of(model), base)
    config = {**config_of(base), key: "relu"}
    (base / "config.json").write_text(json.dumps(config))
    write_sae(tmp_path / "sae")
    said = "has no bias in its MLPs, which a neuron needs so that its gate alone counts"
    if model in ("bloom", "mpt"):
        said = "has no config field for the width of its MLPs"
    if model in ("mixtral", "qwen3_moe"):
        said = "has experts, of which a token passes only some, in layer 1"
    with pytest.raises(EditError, match=said) as caught:
        plan_of(tmp_path, base, [EDIT])
    assert "with an autoencoder of the stream, rank1 adds a feature" in str(caught.value)


SECOND = {**EDIT, "features": [2]}
PRUNED = {"op": "neurons", "neurons": ["L0N1", "L1N2"], "prune": True}


@pytest.mark.parametrize(
    ("edits", "config", "said"),
    [
        ([EDIT], {"architecture": "jumprelu"}, "not, as these features are, by jumprelu"),
        ([EDIT], {"architecture": "topk"}, "not, as these features are, by topk"),
        ([EDIT], {"architecture": "gated"}, "not, as these features are, by gated"),
        ([EDIT], {"activation_fn": "tanh-relu"}, "not, as these features are, by tanh-relu"),
        ([EDIT], {"normalize_activations": "layer_norm"}, "not in the model's units"),
        ([{**EDIT, "features": [12]}], {}, "feature 12 is out of range"),
        ([{**EDIT, "layers": [0]}], {}, "layers and approximate have no meaning"),
        ([{**EDIT, "strength": 1e300}], {}, "into -?inf as float32; use a smaller"),
        ([EDIT, SECOND], {}, r"edits\[0\] and edits\[1\] both widen the model; name everything"),
        ([EDIT, PRUNED], {}, "which another edit widens; apply one recipe to what the other"),
        ([PRUNED, EDIT], {}, "which another edit widens; apply one recipe to what the other"),
    ],
)
def test_what_cannot_be_is_refused(
    edits: list[dict[str, Any]],
    config: dict[str, Any],
    said: str,
    base_of: Callable[..., Path],
    tmp_path: Path,
) -> None:
    write_sae(tmp_path / "sae", **config)
    with pytest.raises(InputError, match=said):
        apply_edits(tmp_path, base_of("opt"), edits, allow_overlap=True)
    assert not (tmp_path / "out").exists()


def test_a_recipe_can_follow_another_that_widened_the_model(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    write_sae(tmp_path / "sae")
    write_sae(tmp_path / "more" / "sae", seed=1)
    once = apply_edits(tmp_path, base_of("opt"), [EDIT])
    editor = editor_of(tmp_path / "more", once, [SECOND])
    assert_equivalent(editor, tmp_path / "twice")
    assert config_of(tmp_path / "twice")["ffn_dim"] == 52
    pruned = {**PRUNED, "neurons": ["L0N48", "L0N49", "L0N50", "L1N48", "L1N49", "L1N50"]}
    back = apply_edits(tmp_path / "less", once, [pruned])
    assert (back / SINGLE).read_bytes() == (base_of("opt") / SINGLE).read_bytes()
