"""Tensors that grow: zeros that come, bytes that stay, and the way back."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from features import EDIT, FLAGGED, RELU, D, K, relu, write_sae
from hypothesis import given
from hypothesis import strategies as st
from models import family_of
from oracles import assert_equivalent, assert_rounded_once, load_model, logits
from recipes import apply_edits, editor_of, plan_of, snapshot, stored, write_recipe

from surgery import api
from surgery.arch import identify
from surgery.checkpoint import INDEX, SINGLE, Checkpoint
from surgery.checkpoint.delta import Delta
from surgery.console.checkpoints import plan_json, plan_text
from surgery.errors import EditError, InputError
from surgery.verify import verify


def parameters(folder: Path) -> int:
    return sum(math.prod(info.shape) for info in Checkpoint.open(folder).tensors.values())


@pytest.mark.parametrize("model", RELU)
def test_every_weight_that_comes_is_counted(
    model: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """By hand: rows, columns and biases of three neurons in both layers, and flagged biases."""
    base = relu(model, base_of)
    write_sae(tmp_path / "sae")
    output = apply_edits(tmp_path, base, [EDIT])
    before, after = (Checkpoint.open(folder) for folder in (base, output))
    gated = family_of(model) == "llama"
    come = 2 * K * ((3 if gated else 2) * D + (2 if gated else 1))
    if model in FLAGGED:  # those of the old neurons, of the down projection, and what else there is
        come += sum(
            math.prod(info.shape)
            for name, info in after.tensors.items()
            if name not in before.tensors
        ) - 2 * K * (2 if gated else 1)
    assert parameters(output) - parameters(base) == come
    sizes = [
        (c.root / SINGLE).stat().st_size - c.headers[SINGLE].data_start for c in (before, after)
    ]
    assert sizes[1] - sizes[0] == 4 * come
    live = [sum(p.numel() for p in load_model(folder).parameters()) for folder in (base, output)]
    assert live[1] - live[0] == come


@pytest.mark.parametrize("model", ["opt", "gpt2", "llama-biased"])
def test_what_was_there_stays_and_the_rest_is_zero_but_for_the_neurons(
    model: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = relu(model, base_of, "bfloat16")
    write_sae(tmp_path / "sae")
    output = apply_edits(tmp_path, base, [EDIT])
    arch = identify(Checkpoint.open(base))
    grown = 0
    for name, info in Checkpoint.open(base).tensors.items():
        old, new, role = stored(base, name), stored(output, name), arch.roles[name]
        kept = new[tuple(slice(size) for size in info.shape)]
        assert kept.tobytes() == old.tobytes(), name
        if new.shape != old.shape:
            grown += 1
            axis = next(i for i in range(new.ndim) if new.shape[i] != old.shape[i])
            come = np.moveaxis(new, axis, 0)[-K:].astype(float)
            held = role.layer == 1 and (role.role, role.kind) != ("up_proj", "weight")
            held |= role.layer == 1 and "gate_proj" not in arch.facts.modules
            assert come.all() if held else not come.any() and not np.signbit(come).any(), name
    assert grown == 2 * (5 if model == "llama-biased" else 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model", ["opt", "gpt2", "llama"])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_base_comes_back_and_the_edit_again_to_the_byte(
    model: str,
    dtype: str,
    sharded: bool,
    base_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the bands, in one file or many, beside other edits, prunings and added tensors."""
    monkeypatch.setattr("surgery.editor.SLAB_BYTES", 700)
    base = relu(model, base_of, dtype)
    base = sharded_copy(base, tmp_path / "base") if sharded else base
    write_sae(tmp_path / "sae")
    edits = [
        {"op": "layers", "layers": [1], "factor": 0.5, "part": "attn"},
        {"op": "neurons", "neurons": ["L0N3", "L1N40"], "factor": 0.5},
        EDIT,
    ]
    if model == "llama":
        pruned = ["L0H0", "L0H1", "L1H2", "L1H3"]
        edits[0] = {"op": "heads", "heads": pruned, "prune": True}
    recipe = write_recipe(tmp_path, edits)
    api.apply(recipe, base, tmp_path / "edited", delta=tmp_path / "d.safetensors")
    api.revert(tmp_path / "edited", tmp_path / "d.safetensors", tmp_path / "back")
    api.apply(tmp_path / "d.safetensors", base, tmp_path / "again")
    assert contents(tmp_path / "back") == contents(base)
    assert contents(tmp_path / "again") == contents(tmp_path / "edited")
    assert verify(tmp_path / "edited", base, recipe).findings == ()
    assert logits(load_model(tmp_path / "edited")).std() > 0
    editor = editor_of(tmp_path, base, edits)
    assert_equivalent(editor, tmp_path / "out")
    assert_rounded_once(editor, tmp_path / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in snapshot(folder).items()}


def sharded_copy(base: Path, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model.save_pretrained(folder, max_shard_size="15KB")
    assert (folder / INDEX).exists()
    return folder


def test_a_delta_holds_the_neurons_and_no_zeros(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    write_sae(tmp_path / "sae")
    api.apply(
        write_recipe(tmp_path, [EDIT]), base_of("opt"), tmp_path / "o", delta=tmp_path / "d.st"
    )
    delta = Delta.open(tmp_path / "d.st")
    assert sum(region.region.size for region in delta.record.regions) == K * (2 * D + 1)
    assert {r.tensor.split(".")[-2] for r in delta.record.resized} == {"fc1", "fc2"}
    assert len(delta.record.resized) == 6


@given(data=st.data())
def test_a_flipped_bit_of_a_delta_never_gives_a_wrong_checkpoint(
    base_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Half of the bits are of the text that says what grows."""
    folder, base = tmp_path_factory.mktemp("flip"), base_of("opt")
    write_sae(folder / "sae")
    recipe, delta = write_recipe(folder, [EDIT]), folder / "d.safetensors"
    api.apply(recipe, base, folder / "edited", delta=delta)
    raw = bytearray(delta.read_bytes())
    resized = raw.index(b"resized")
    place = data.draw(st.integers(resized, resized + 700) | st.integers(0, len(raw) - 1))
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    delta.write_bytes(raw)
    for way, source, expected in (
        (api.revert, folder / "edited", base),
        (lambda a, b, c: api.apply(b, a, c), base, folder / "edited"),
    ):
        try:
            way(source, delta, folder / "out")
        except InputError:
            assert not (folder / "out").exists()
        else:
            assert contents(folder / "out") == contents(expected)
            shutil.rmtree(folder / "out")
    shutil.rmtree(folder)


def test_the_index_the_plan_and_the_receipt_say_what_has_grown(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = sharded_copy(base_of("opt"), tmp_path / "base")
    write_sae(tmp_path / "sae")
    plan = plan_of(tmp_path, base, [EDIT])
    output = apply_edits(tmp_path, base, [EDIT])
    come = parameters(output) - parameters(base)
    before, after = (json.loads((f / INDEX).read_text()) for f in (base, output))
    assert after["metadata"]["total_size"] - before["metadata"]["total_size"] == 4 * come
    assert after["metadata"]["total_parameters"] - before["metadata"]["total_parameters"] == come
    assert before["weight_map"] == after["weight_map"]
    name, other = (f"model.decoder.layers.{layer}.fc2.weight" for layer in (1, 0))
    assert f"{name} becomes 32×51 instead of 32×48" in plan_text(plan)
    assert f"{other} becomes 32×51 instead of 32×48" in plan_text(plan)
    assert "config.json: ffn_dim becomes 51" in plan_text(plan)
    assert plan_json(plan)["grown"][name] == [32, 51]
    assert plan_json(plan)["pruned"] == {}
    assert plan.disk_bytes == sum(f.stat().st_size for f in output.glob("*.safetensors"))
    receipt = json.loads((output / "surgery-receipt.json").read_text())
    records = {record["name"]: record for record in receipt["predicate"]["tensors"]}
    assert len(records) == 6
    assert records[name]["grown"] == {"axis": 1, "kept": [[0, 48]], "shape": [32, 51]}
    assert records[name]["pruned"] is None
    assert records[other]["change"]["elements"] == "0"
    assert records[name]["change"]["elements"] == str(K * D)
    for side, folder in (("before", base), ("after", output)):
        digest = hashlib.sha256(Checkpoint.open(folder).read_bytes(name)).hexdigest()
        assert records[name][f"{side}_sha256"] == digest


@pytest.mark.parametrize(
    ("tensor", "index", "ulps"),
    [
        ("model.decoder.layers.1.fc2.weight", (5, 50), 2),
        ("model.decoder.layers.1.fc2.weight", (5, 3), 1),
        ("model.decoder.layers.0.fc2.weight", (31, 48), 1),
        ("model.decoder.layers.0.fc1.weight", (50, 0), 1),
        ("model.decoder.layers.1.fc1.bias", (49,), 2),
    ],
)
def test_verify_finds_a_changed_weight_of_a_grown_tensor(
    tensor: str,
    index: tuple[int, ...],
    ulps: int,
    base_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a neuron beyond what rounding may do, and to the bit in what was there and in zeros."""
    monkeypatch.setattr("surgery.editor.SLAB_BYTES", 700)
    write_sae(tmp_path / "sae")
    output = apply_edits(tmp_path, base_of("opt"), [EDIT])
    info = Checkpoint.open(output).info(tensor)
    raw = bytearray((output / SINGLE).read_bytes())
    raw[info.begin + 4 * int(np.ravel_multi_index(index, info.shape))] ^= ulps
    (output / SINGLE).write_bytes(raw)
    found = verify(output, base_of("opt"), tmp_path / "recipe.json").findings
    messages = {finding.symptom: finding.message for finding in found}
    assert f"{tensor}: at {list(index)} holds" in messages["wrong value"]


def test_what_is_stored_in_bytes_only_cannot_grow(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Not even by zeros, in a layer that gains no neuron."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base_of("opt"), tmp_path / "base")
    tensors = load_file(tmp_path / "base" / SINGLE)
    name = "model.decoder.layers.0.fc1.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "base" / SINGLE, {"format": "pt"})
    write_sae(tmp_path / "sae")
    with pytest.raises(EditError, match=rf"'{name}' is stored as F8_E4M3, which cannot be edited"):
        plan_of(tmp_path, tmp_path / "base", [EDIT])
