"""Laws of edits on whole checkpoints whose numbers are any bits at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import write_adapter, write_auroc, write_factors, write_means, write_vector
from recipes import (
    HEADS,
    NEURONS,
    apply_edits,
    make_sae,
    plan_of,
    sae_edit,
    stored,
    weight_files,
)

from surgery.apply import apply_plan
from surgery.checkpoint import SINGLE, Checkpoint
from surgery.errors import EditError, RecipeError
from surgery.verify import ulp_distance, verify

O_PROJ = {
    "gpt2": "transformer.h.0.attn.c_proj.weight",
    "llama": "model.layers.0.self_attn.o_proj.weight",
}
DOWN = {"gpt2": "transformer.h.0.mlp.c_proj.weight", "llama": "model.layers.0.mlp.down_proj.weight"}
DIRECTION = {"op": "direction", "vector": {"file": "d.safetensors", "key": "d"}}
CIRCUIT = {"op": "head_spectrum", "heads": ["L0H1", "L1H2"], "components": [0], "factor": 1}
NOTHING_OF_IT = {"model": "other", "weight": 0}
NO_OPS = {
    "heads": ("", {**HEADS, "factor": 1.0}),
    "neurons": ("", {**NEURONS, "factor": 1}),
    "heads, mean": ("", {**HEADS, "factor": 1.0, "mean": {"file": "means.safetensors"}}),
    "neurons, mean": (
        "",
        {**NEURONS, "factor": 1, "mean": {"file": "means.safetensors", "key": "neurons"}},
    ),
    "damp": (
        "",
        {"op": "neurons", "auroc": {"file": "auroc.csv"}, "method": "damp", "factor": 1.0},
    ),
    "orthogonalize": ("blocks.0.hook_resid_post", sae_edit("orthogonalize", strength=0.0)),
    "z_project": ("blocks.0.attn.hook_z", sae_edit("z_project", strength=0.0)),
    "steer_bias": ("blocks.0.hook_mlp_out", sae_edit("steer_bias", strength=0.0)),
    "low_rank": ("", {"op": "low_rank", "file": "uv.safetensors", "scale": 0}),
    "lora": ("", {"op": "lora", "adapter": "adapter", "scale": -0.0}),
    "direction": ("", {**DIRECTION, "strength": 0}),
    "direction, norms kept": ("", {**DIRECTION, "strength": -0.0, "keep_norms": "columns"}),
    "lm_head_spectrum": ("", {"op": "lm_head_spectrum", "components": [0], "factor": 1}),
    "head_spectrum": ("", {**CIRCUIT, "circuit": "ov"}),
    "head_spectrum, qk": ("", {**CIRCUIT, "circuit": "qk"}),
    "layers": ("", {"op": "layers", "layers": "all", "factor": 1}),
    **{
        f"merge, {method}": ("", {"op": "merge", "with": [NOTHING_OF_IT], "method": method})
        for method in ("linear", "task_arithmetic", "slerp", "ties")
    },
    "steer_bias -0": ("blocks.0.attn.hook_z", sae_edit("steer_bias", strength=-0.0)),
}
WRITE = {
    "low_rank": write_factors,
    "lora": write_adapter,
    "direction": write_vector,
    "direction, norms kept": write_vector,
}
UNTYING = {"orthogonalize", "lm_head_spectrum", *WRITE}
WRITE |= {"damp": write_auroc, "heads, mean": write_means, "neurons, mean": write_means}
ODD_BITS = {"float32": [0x7FA12345, 0xFFC00001, 0x80000000, 0x7F800000, 1, 0x80000001]}
ODD_BITS |= {"bfloat16": [0x7FA1, 0xFFC1, 0x8000, 0xFF80, 1, 0x8001]}
ODD_BITS |= {"float16": [0x7D01, 0xFE01, 0x8000, 0xFC00, 1, 0x8001]}


def planted(base: Path, folder: Path, dtype: str, seed: int = 0) -> Path:
    """A copy of `base` with odd numbers (NaNs with payloads, infinities, -0.0) all over it,
    and each of them in every tensor."""
    shutil.copytree(base, folder)
    size = 4 if dtype == "float32" else 2
    data = bytearray((folder / SINGLE).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    numbers = np.frombuffer(data[start:], f"<u{size}").copy()
    odd, rng = np.array(ODD_BITS[dtype], numbers.dtype), np.random.default_rng(seed)
    places = rng.choice(numbers.size, numbers.size // 50, replace=False)
    numbers[places] = rng.choice(odd, places.size)
    for info in Checkpoint.open(base).tensors.values():
        first = (info.begin - start) // size
        numbers[first : first + odd.size] = odd
    data[start:] = numbers.tobytes()
    (folder / SINGLE).write_bytes(data)
    return folder


@pytest.mark.parametrize("dtype", ODD_BITS)
@pytest.mark.parametrize("name", NO_OPS)
def test_an_edit_that_does_nothing_writes_the_same_file(
    name: str, dtype: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = planted(base_of("gpt2", dtype), tmp_path / "base", dtype)
    hook, edit = NO_OPS[name]
    if hook:
        make_sae(tmp_path / "sae", hook, 32)
    if name.startswith("merge"):
        planted(base_of("gpt2", dtype), tmp_path / "other", dtype, seed=1)
    if name in WRITE:
        WRITE[name](tmp_path, base)
    untie = name in UNTYING
    output = apply_edits(tmp_path, base, [edit], untie=untie)
    before, after = Checkpoint.open(base), Checkpoint.open(output)
    assert {n: before.read_bytes(n) for n in before.tensors} == {
        n: after.read_bytes(n) for n in before.tensors
    }
    assert untie or weight_files(base) == weight_files(output)


def test_a_product_keeps_the_bits_where_it_adds_nothing(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """-0.0 and NaN payloads too, in rows whose factor is 0; a scale of 0 looks at no factor."""
    from safetensors.numpy import save_file

    base, name = planted(base_of("llama"), tmp_path / "base", "float32"), DOWN["llama"]
    u = np.array([0.0] * 31 + [1], np.float32)
    save_file({f"{name}.u": u, f"{name}.v": np.ones(48, np.float32)}, tmp_path / "uv.safetensors")
    edit = {"op": "low_rank", "file": "uv.safetensors"}
    output = apply_edits(tmp_path, base, [edit])
    before, after = (stored(folder, name) for folder in (base, output))
    assert before[:31].tobytes() == after[:31].tobytes()
    assert np.signbit(before[:31][before[:31] == 0]).any()
    assert before[31].tobytes() != after[31].tobytes()
    (tmp_path / "again").mkdir()
    nothing = {
        f"{name}.{side}": np.full(n, np.nan, np.float32) for side, n in (("u", 32), ("v", 48))
    }
    save_file(nothing, tmp_path / "again" / "uv.safetensors")
    output = apply_edits(tmp_path / "again", base, [{**edit, "scale": 0}])
    assert weight_files(output) == weight_files(base)


@pytest.mark.parametrize("dtype", ODD_BITS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_factor_of_zero_writes_positive_zeros_over_anything_and_nothing_else(
    family: str, dtype: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = planted(base_of(family, dtype), tmp_path / "base", dtype)
    output = apply_edits(tmp_path, base, [{"op": "heads", "heads": ["L0H1"]}])
    before, after = (stored(folder, O_PROJ[family]) for folder in (base, output))
    head = np.s_[8:16] if family == "gpt2" else np.s_[:, 8:16]
    assert after[head].tobytes() == bytes(after[head].nbytes)
    expected = before.copy()
    expected[head] = 0
    assert after.tobytes() == expected.tobytes()


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    op=st.sampled_from(["heads", "neurons"]),
    model=st.sampled_from(["gpt2", "bert", "opt", "llama-biased"]),
    factor=st.floats(-2, 2),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_about_a_mean_of_zero_is_about_zero_to_the_byte(
    op: str,
    model: str,
    factor: float,
    dtype: str,
    base_of: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("mean")
    edit = {**(HEADS if op == "heads" else NEURONS), "factor": factor}
    write_means(folder, base_of(model, dtype))
    key = "mean.zero" if op == "heads" else "neurons.zero"
    mean = {**edit, "mean": {"file": "means.safetensors", "key": key}}
    zero = apply_edits(folder / "zero", base_of(model, dtype), [edit])
    about = apply_edits(folder, base_of(model, dtype), [mean])
    assert weight_files(zero) == weight_files(about)


@st.composite
def prunings(draw: st.DrawFn) -> dict[str, Any]:
    """One head of each group in each layer of a model with four heads in two groups."""
    heads = [
        f"L{layer}H{2 * group + draw(st.integers(0, 1))}" for layer in (0, 1) for group in (0, 1)
    ]
    return {"op": "heads", "heads": draw(st.permutations(heads))}


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edit=prunings() | st.just({"op": "neurons", "neurons": ["L0N3", "L0N47", "L1N0", "L1N1"]}),
    model=st.sampled_from(["qwen3", "phi3", "llama-biased"]),
)
def test_pruning_only_takes_zeros_out(
    edit: dict[str, Any],
    model: str,
    base_of: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """What is left of every tensor is what the zeroed one holds there, to the bit."""
    folder = tmp_path_factory.mktemp("prune")
    zero = apply_edits(folder / "zero", base_of(model, "bfloat16"), [edit])
    plan = plan_of(folder, base_of(model, "bfloat16"), [{**edit, "prune": True}])
    apply_plan(plan, folder / "pruned")
    for name in Checkpoint.open(zero).tensors:
        before, after = (stored(side, name) for side in (zero, folder / "pruned"))
        if name in plan.resized:
            resize = plan.resized[name]
            kept = np.concatenate([np.arange(*run) for run in resize.kept])
            before = before.take(kept, resize.axis)
        assert before.tobytes() == after.tobytes() and before.shape == after.shape, name
    assert len(plan.resized) >= 4


def test_a_nan_in_the_source_outside_the_region_is_kept_bit_for_bit(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = planted(base_of("llama", "bfloat16"), tmp_path / "base", "bfloat16")
    output = apply_edits(tmp_path, base, [{**HEADS, "factor": 0.5}])
    for name in Checkpoint.open(base).tensors:
        before, after = (stored(folder, name) for folder in (base, output))
        with np.errstate(invalid="ignore"):
            odd = np.isnan(before)
        assert odd.any() or before.size < 100
        assert before[odd].tobytes() == after[odd].tobytes()
    assert verify(output, base).findings == ()


def test_a_nan_spread_by_a_projection_is_refused(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = planted(base_of("llama"), tmp_path / "base", "float32")
    make_sae(tmp_path / "sae", "blocks.0.attn.hook_z", 32)
    with pytest.raises(EditError, match=r"o_proj.weight': the edit turns .* into nan"):
        apply_edits(tmp_path, base, [sae_edit("z_project")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "place"), [("gpt2", "[24, 0]"), ("llama", "[0, 24]")])
def test_an_overflow_names_the_tensor_and_the_index_in_it(
    family: str, place: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    edit = {"op": "heads", "heads": ["L0H3"], "factor": 1e9}
    with pytest.raises(EditError) as caught:
        apply_edits(tmp_path, base_of(family, "float16"), [edit])
    assert f"'{O_PROJ[family]}': the edit turns" in str(caught.value)
    assert f"at {place} into" in str(caught.value)


PAIRS = st.tuples(st.floats(-2, 2), st.floats(0.1, 1.5))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numbers=PAIRS, dtype=st.sampled_from(["float32", "bfloat16"]))
def test_commuting_edits_give_the_same_bytes_up_to_one_rounding(
    numbers: tuple[float, float],
    dtype: str,
    base_of: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Scaling inputs and projecting outputs commute in exact numbers; in float32 they differ by
    its rounding, which is far below one bfloat16."""
    factor, strength = numbers
    folder = tmp_path_factory.mktemp("pair")
    edits = [{**HEADS, "factor": factor}, sae_edit("orthogonalize", layers=[0], strength=strength)]
    found = []
    for name, order in (("ab", edits), ("ba", edits[::-1])):
        make_sae(folder / name / "sae", "blocks.0.hook_attn_out", 32)
        output = apply_edits(folder / name, base_of("llama", dtype), order)
        found.append(stored(output, O_PROJ["llama"]))
    if dtype == "bfloat16":
        assert (ulp_distance(*found) <= 1).all()
    difference = np.abs(found[0].astype(float) - found[1].astype(float)).max()
    scale = np.abs(found[0].astype(float)).max()
    assert difference <= scale * (1e-6 if dtype == "float32" else 2**-8)


CLASHES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "same head": ("", [HEADS, {"op": "heads", "heads": ["L1H2"], "factor": 0.5}]),
    "same neuron": ("", [NEURONS, {"op": "neurons", "neurons": ["L0N3"]}]),
    "head and z": ("blocks.0.attn.hook_z", [HEADS, sae_edit("z_project")]),
    "twice steered": ("blocks.0.hook_mlp_out", [sae_edit("steer_bias"), sae_edit("steer_bias")]),
    "steered and projected": (
        "blocks.0.hook_mlp_out",
        [sae_edit("steer_bias"), sae_edit("orthogonalize", layers=[0])],
    ),
    "twice projected": (
        "blocks.0.hook_mlp_out",
        [sae_edit("orthogonalize", layers=[0]), sae_edit("orthogonalize", layers="0-1")],
    ),
}


@pytest.mark.parametrize("clash", CLASHES)
def test_two_edits_of_one_region_need_leave(
    clash: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    hook, edits = CLASHES[clash]
    if hook:
        make_sae(tmp_path / "sae", hook, 32)
    with pytest.raises(RecipeError, match=r"edits\[0\] and edits\[1\] both change .*allow_overlap"):
        apply_edits(tmp_path, base_of("gpt2"), edits)
    assert apply_edits(tmp_path, base_of("gpt2"), edits, allow_overlap=True).is_dir()


def test_overlapping_edits_apply_in_the_order_of_the_recipe(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    edits = [{**HEADS, "factor": 3.0}, {"op": "heads", "heads": ["L0H1"], "factor": 0.5}]
    base = base_of("gpt2")
    output = apply_edits(tmp_path, base, edits, allow_overlap=True)
    before, after = (stored(folder, O_PROJ["gpt2"]) for folder in (base, output))
    assert (after[8:16] == before[8:16] * np.float32(3) * np.float32(0.5)).all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_neighbouring_regions_do_not_clash(
    family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    edits = [{"op": "heads", "heads": [f"L0H{h}"]} for h in range(4)]
    edits += [
        {"op": "neurons", "neurons": ["L0N3"]},
        {"op": "neurons", "neurons": ["L0N4", "L1N3"]},
    ]
    output = apply_edits(tmp_path, base_of(family), edits)
    assert not stored(output, O_PROJ[family]).any()
    assert stored(output, DOWN[family]).any()
