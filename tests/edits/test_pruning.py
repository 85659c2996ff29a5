"""Pruned checkpoints: what is gone, bytes, the way back, refusals.

That what is left is the zeroed model is in `contracts`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import Case, pruning_cases
from hypothesis import given
from hypothesis import strategies as st
from inputs import write_means
from models import MODELS, config_of, family_of
from oracles import load_model, logits
from prunings import (
    A_GROUP,
    DIVISOR,
    FREE,
    NO_FIELD,
    ONE_OF_EACH,
    THREE,
    pruned_neurons,
)
from recipes import apply_edits, plan_of, snapshot, stored, write_recipe

from surgery import api
from surgery.arch import identify
from surgery.checkpoint import INDEX, SINGLE, Checkpoint
from surgery.console.checkpoints import plan_json, plan_text
from surgery.errors import EditError, InputError, RecipeError
from surgery.verify import verify

CASES = [case for case in pruning_cases() if not case.refused]
HEADS_GONE = {id(ONE_OF_EACH): (2, 0), id(A_GROUP): (2, 1), id(THREE): (3, 1)}
"""Of each layer: how many heads and key-value heads."""


def zeroed(edit: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in edit.items() if key != "prune"}


def parameters(folder: Path) -> int:
    return sum(math.prod(info.shape) for info in Checkpoint.open(folder).tensors.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_weight_that_goes_is_counted(
    case: Case, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """By hand: what heads and neurons have of weights and biases."""
    model, edit = case.model, case.edit
    base = base_of(model)
    output = apply_edits(tmp_path, base, [edit])
    sizes, config = identify(Checkpoint.open(base)).sizes, config_of(base)
    assert identify(Checkpoint.open(output)).roles.keys() == Checkpoint.open(base).tensors.keys()
    width, dim = sizes["width"], sizes["head_dim"]
    if edit["op"] == "heads":
        biased = model in ("llama-biased", "qwen2", "gemma-biased")
        heads, kv_heads = (2 * count for count in HEADS_GONE[id(edit)])
        gone = dim * (2 * heads + 2 * kv_heads) * width + biased * dim * (heads + 2 * kv_heads)
    else:
        gated = family_of(model) in ("llama", "mistral", "phi3", "mixtral") or model[:4] in (
            "qwen",
            "gemm",
        )
        biased = model == "llama-biased" or (not gated and model not in (
            "falcon", "falcon-new", "falcon-one-norm", "opt-unbiased"
        ))  # fmt: skip
        gone = len(edit["neurons"]) * ((3 if gated else 2) * width + (1 + gated) * biased)
    assert parameters(base) - parameters(output) == gone
    assert sum(p.numel() for p in load_model(base).parameters()) - gone == sum(
        p.numel() for p in load_model(output).parameters()
    )
    data = [Checkpoint.open(f).headers[SINGLE] for f in (base, output)]
    files = [
        (f / SINGLE).stat().st_size - h.data_start
        for f, h in zip((base, output), data, strict=True)
    ]
    assert files[0] - files[1] == 4 * gone
    after = config_of(output)
    changed = {key for key in after if after[key] != config.get(key)}
    assert (
        changed <= {"num_attention_heads", "num_key_value_heads", "head_dim"} or len(changed) == 1
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["llama", "qwen3", "phi3", "gpt2"])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_base_comes_back_and_the_edit_again_to_the_byte(
    model: str,
    dtype: str,
    sharded: bool,
    base_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the bands, in one file or many, beside other edits and added tensors."""
    monkeypatch.setattr("surgery.editor.SLAB_BYTES", 700)
    base = base_of(model, dtype)
    if sharded:
        base = _sharded(base, tmp_path / "base")
    write_means(tmp_path, base)
    edits = [
        {"op": "layers", "layers": [1], "factor": 0.5, "part": "mlp"},
        pruned_neurons(model),
    ]
    if model == "llama":
        mean = {"file": "means.safetensors"}
        edits += [{**A_GROUP, "mean": mean}]
    elif model != "gpt2":
        edits += [A_GROUP]
    recipe = write_recipe(tmp_path, edits)
    api.apply(recipe, base, tmp_path / "edited", delta=tmp_path / "d.safetensors")
    api.revert(tmp_path / "edited", tmp_path / "d.safetensors", tmp_path / "back")
    api.apply(tmp_path / "d.safetensors", base, tmp_path / "again")
    assert _contents(tmp_path / "back") == _contents(base)
    assert _contents(tmp_path / "again") == _contents(tmp_path / "edited")
    assert verify(tmp_path / "edited", base, recipe).findings == ()
    assert logits(load_model(tmp_path / "edited")).std() > 0


@given(data=st.data())
def test_a_flipped_bit_of_a_delta_never_gives_a_wrong_checkpoint(
    base_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Half of the bits are of the text that says what is left."""
    folder, base = tmp_path_factory.mktemp("flip"), base_of("qwen3")
    recipe, delta = write_recipe(folder, [A_GROUP]), folder / "d.safetensors"
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
            assert _contents(folder / "out") == _contents(expected)
            shutil.rmtree(folder / "out")
    shutil.rmtree(folder)


def _contents(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in snapshot(folder).items()}


def _sharded(base: Path, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model.save_pretrained(folder, max_shard_size="15KB")
    assert (folder / INDEX).exists()
    return folder


def test_the_index_the_plan_and_the_receipt_say_what_is_left(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = _sharded(base_of("qwen3"), tmp_path / "base")
    plan = plan_of(tmp_path, base, [A_GROUP])
    output = apply_edits(tmp_path, base, [A_GROUP])
    gone = parameters(base) - parameters(output)
    before, after = (json.loads((f / INDEX).read_text()) for f in (base, output))
    assert before["metadata"]["total_size"] - after["metadata"]["total_size"] == 4 * gone
    assert before["metadata"]["total_parameters"] - after["metadata"]["total_parameters"] == gone
    assert before["weight_map"] == after["weight_map"]
    name = "model.layers.0.self_attn.k_proj.weight"
    assert f"{name} becomes 16×32 instead of 32×32" in plan_text(plan)
    assert "config.json: num_attention_heads becomes 2" in plan_text(plan)
    assert plan_json(plan)["pruned"][name] == [16, 32]
    assert plan.disk_bytes == sum(f.stat().st_size for f in output.glob("*.safetensors"))
    receipt = json.loads((output / "surgery-receipt.json").read_text())
    records = {record["name"]: record for record in receipt["predicate"]["tensors"]}
    assert len(records) == 8
    assert records[name]["pruned"] == {"axis": 0, "kept": [[16, 32]], "shape": [16, 32]}
    assert records[name]["change"]["elements"] == "0"
    q = "model.layers.1.self_attn.q_proj.weight"
    assert (stored(output, q) == stored(base, q)[:32]).all()


def test_a_config_that_left_the_size_of_a_head_out_says_it_now(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_of("llama"), base)
    config = config_of(base)
    assert config.pop("head_dim") == 8
    (base / "config.json").write_text(json.dumps(config))
    output = apply_edits(tmp_path, base, [A_GROUP])
    assert config_of(output)["head_dim"] == 8
    assert logits(load_model(output)).std() > 0


def test_what_is_stored_in_bytes_only_cannot_be_pruned(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base_of("qwen3"), tmp_path / "base")
    tensors = load_file(tmp_path / "base" / SINGLE)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "base" / SINGLE, {"format": "pt"})
    assert plan_of(tmp_path, tmp_path / "base", [zeroed(A_GROUP)]).steps
    with pytest.raises(EditError, match=rf"'{name}' is stored as F8_E4M3, which cannot be edited"):
        plan_of(tmp_path, tmp_path / "base", [A_GROUP])


def test_verify_finds_a_changed_weight_of_a_pruned_tensor(
    base_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named by where it lies now, whatever the bands."""
    monkeypatch.setattr("surgery.editor.SLAB_BYTES", 700)
    base = base_of("qwen3")
    output = apply_edits(tmp_path, base, [A_GROUP])
    info = Checkpoint.open(output).info("model.layers.0.self_attn.k_proj.weight")
    raw = bytearray((output / SINGLE).read_bytes())
    raw[info.begin + 5 * 4 * 32 + 7] ^= 1
    (output / SINGLE).write_bytes(raw)
    found = {finding.symptom: finding.message for finding in verify(output, base).findings}
    assert "at [5, 1] holds" in found["wrong value"]


@pytest.mark.parametrize("model", MODELS)
def test_what_no_config_can_say_is_refused_with_a_way_out(
    model: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    family = family_of(model)
    one = {**ONE_OF_EACH, "heads": ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0"]}
    refused = [(ONE_OF_EACH, f"{family}: heads cannot be pruned: a head's size is the width")]
    if model in (*FREE, *DIVISOR):
        refused = [
            (one, r"layer 0 would keep \[\] heads .*each must keep as many or go"),
            ({**ONE_OF_EACH, "heads": ["L0H0", "L1H2"]}, r"layer 0 would keep \[1, 2\] heads"),
            (
                {**ONE_OF_EACH, "heads": ["L0H0", "L0H2", "L1H0", "L1H1"]},
                r"layer 0 would keep \[1, 1\] .*, layer 1 \[2\]; every layer must lose as many",
            ),
            (
                {**ONE_OF_EACH, "heads": ["L0H0", "L0H2"]},
                r"layer 0 would keep \[1, 1\] .*, layer 1 \[2, 2\]; every",
            ),
        ]
    if model in NO_FIELD:
        refused += [(pruned_neurons(model), f"{family}: .* no field for the width of the MLP")]
    else:
        uneven = pruned_neurons(model)["neurons"][:-1]
        refused += [
            ({**pruned_neurons(model), "neurons": uneven}, "would lose 3 neurons, .* 2; each")
        ]
    if model == "llama":
        every = [f"L{layer}N{n}" for layer in (0, 1) for n in range(48)]
        refused += [({**pruned_neurons(model), "neurons": every}, "would lose 48 .*, and not all")]
    for edit, said in refused:
        with pytest.raises(EditError, match=said) as caught:
            plan_of(tmp_path, base_of(model), [edit])
        assert "or leave prune out" in str(caught.value) or "; leave prune out" in str(caught.value)
        assert plan_of(tmp_path, base_of(model), [zeroed(edit)]).steps


@pytest.mark.parametrize("model", DIVISOR)
def test_a_number_of_heads_that_does_not_divide_the_width_is_refused(
    model: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Four heads with a key-value head each: one less is three, which 32 is no multiple of."""
    base = base_of(model, num_key_value_heads=4)
    one, two = (
        {**ONE_OF_EACH, "heads": [f"L{x}H{h}" for x in (0, 1) for h in range(n)]} for n in (1, 2)
    )
    with pytest.raises(EditError, match=r"3 heads cannot be left: .* which is 32; prune another"):
        plan_of(tmp_path, base, [one])
    assert plan_of(tmp_path, base, [two]).config["num_key_value_heads"] == 2


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ([{**A_GROUP, "factor": 0.5}], "it goes with factor 0"),
        (
            [A_GROUP, {**A_GROUP, "heads": ["L0H2", "L0H3", "L1H0", "L1H1"]}],
            "both prune .*; name everything in one",
        ),
        ([A_GROUP, {"op": "heads", "heads": ["L0H0"]}], "both change .*; the first leaves it out"),
    ],
)
def test_what_is_left_out_cannot_be_changed(
    edits: list[dict[str, Any]], said: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises((EditError, RecipeError), match=said):
        plan_of(tmp_path, base_of("qwen3"), edits, allow_overlap=True)
    if len(edits) == 2 and "prune" not in edits[1]:
        assert plan_of(tmp_path, base_of("qwen3"), edits[::-1], allow_overlap=True).resized
