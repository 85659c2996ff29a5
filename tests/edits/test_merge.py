"""`merge` against float64 references computed here from the definitions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from inputs import EMBED, write_partners
from models import FAMILIES, make
from recipes import apply_edits, editor_of, plan_of, stored

from surgery.apply import apply_plan
from surgery.checkpoint import Checkpoint
from surgery.edits.mixing import arc, elected, least_kept
from surgery.errors import InputError
from surgery.verify import verify

Numbers = np.ndarray[Any, Any]
OTHER = {"model": "other", "weight": 0.4}
THIRD = {"model": "third", "weight": 0.35}


def merge(*partners: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"op": "merge", "with": list(partners), **fields}


def mean(base: Numbers, others: list[Numbers]) -> Numbers:
    return 0.25 * base + 0.4 * others[0] + 0.35 * others[1]


def arithmetic(base: Numbers, others: list[Numbers]) -> Numbers:
    return base + 1.5 * (others[0] - base) - 0.5 * (others[1] - base)


def great_circle(base: Numbers, others: list[Numbers]) -> Numbers:
    a, b = base / np.linalg.norm(base), others[0] / np.linalg.norm(others[0])
    angle = np.arccos((a * b).sum())
    if abs(np.cos(angle)) > 0.9995:
        return 0.6 * base + 0.4 * others[0]
    both = np.sin(0.6 * angle) * base + np.sin(0.4 * angle) * others[0]
    return np.asarray(both / np.sin(angle))


def ties(base: Numbers, others: list[Numbers]) -> Numbers:
    """Element by element, as the paper tells it."""
    deltas = []
    for other in others:
        delta = (other - base).ravel()
        kept = np.argsort(-np.abs(delta), kind="stable")[: max(1, int(0.3 * delta.size))]
        trimmed = np.zeros_like(delta)
        trimmed[kept] = delta[kept]
        deltas.append(trimmed)
    merged = base.ravel().copy()
    for i in range(merged.size):
        parts = [(w, d[i]) for w, d in zip((0.4, 0.35), deltas, strict=True)]
        positive = sum(w * d for w, d in parts) >= 0
        agreeing = [(w, d) for w, d in parts if (d > 0) == positive and d != 0]
        if agreeing:
            merged[i] += sum(w * d for w, d in agreeing) / sum(w for w, _ in agreeing)
    return merged.reshape(base.shape)


METHODS: dict[str, tuple[Callable[..., Numbers], dict[str, Any]]] = {
    "linear": (mean, merge(OTHER, THIRD)),
    "task_arithmetic": (
        arithmetic,
        merge({**OTHER, "weight": 1.5}, {**THIRD, "weight": -0.5}, method="task_arithmetic"),
    ),
    "slerp": (great_circle, merge(OTHER, method="slerp")),
    "ties": (ties, merge(OTHER, THIRD, method="ties", density=0.3)),
}


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_is_what_the_definition_says(
    method: str, family: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base, (reference, edit) = base_of(family), METHODS[method]
    write_partners(tmp_path, base)
    output = apply_edits(tmp_path, base, [edit])
    for name in Checkpoint.open(base).tensors:
        own, *others = (
            stored(f, name).astype(float) for f in (base, tmp_path / "other", tmp_path / "third")
        )
        expected = reference(own, others)
        assert np.abs(stored(output, name) - expected).max() < 1e-6, name
        assert (stored(output, name) != stored(base, name)).any()
    assert verify(output, base, tmp_path / "recipe.json").findings == ()


ROW = {
    "base": [0.5, -1.25, 0.75, 2.0, -0.3, 0.1, -0.9, 1.5],
    "other": [0.9, -1.0, 0.5, 2.7, -0.35, -0.4, -1.8, 1.4],
    "third": [0.2, -1.1, 0.85, 2.4, -0.8, 0.7, -1.0, 0.8],
}
HALF = {"method": "ties", "density": 0.5}
MERGEKIT: dict[str, tuple[dict[str, Any], list[float]]] = {
    "linear, weights 1, 2, 1": (
        merge({**OTHER, "weight": 2 / 4}, {**THIRD, "weight": 1 / 4}),
        [0.625, -1.08749998, 0.649999976, 2.45000005, -0.449999988, 0.0, -1.375, 1.2750001],
    ),
    "task_arithmetic, weights 1.5, -0.5": (
        METHODS["task_arithmetic"][1],
        [1.25, -0.949999988, 0.324999988, 2.8499999, -0.124999985, -0.949999928, -2.19999981,
         1.69999993],
    ),
    "task_arithmetic, weights 0.6, 0.3, normalize, lambda 0.8": (
        merge(
            {**OTHER, "weight": 0.8 * 0.6 / 0.9},
            {**THIRD, "weight": 0.8 * 0.3 / 0.9},
            method="task_arithmetic",
        ),
        [0.633333325, -1.07666671, 0.643333316, 2.48000002, -0.460000008, -0.00666668266,
         -1.40666676, 1.25999999],
    ),
    "slerp, t 0.4": (
        merge(OTHER, method="slerp"),
        [0.668942094, -1.16475558, 0.658245385, 2.31029654, -0.324210107, -0.101737805, -1.27718997,
         1.47892261],
    ),
    "ties, density 0.5": (
        merge(OTHER, THIRD, **HALF),
        [0.899999976, -1.25, 0.75, 2.56000018, -0.800000012, 0.699999988, -1.79999995, 0.800000012],
    ),
    "ties, density 1": (
        merge(OTHER, THIRD, method="ties"),
        [0.899999976, -1.04666662, 0.5, 2.56000018, -0.560000002, 0.699999988, -1.42666662, 1.12],
    ),
    "ties, weights 0.6, -0.35": (
        merge({**OTHER, "weight": 0.6}, {**THIRD, "weight": -0.35}, **HALF),
        [0.899999976, -1.25, 0.75, 2.70000005, -0.800000012, -1.9399997, -1.79999995, 0.800000012],
    ),
    "ties, normalize false, lambda 0.7": (
        merge(
            {**OTHER, "weight": 0.7 * 0.4}, {**THIRD, "weight": 0.7 * 0.35}, **HALF, normalize=False
        ),
        [0.611999989, -1.25, 0.75, 2.29400015, -0.422500014, 0.246999979, -1.15199995, 1.32850003],
    ),
}  # fmt: skip
"""What mergekit 0.1.5 made of the three rows in float32, run once by itself; weights are 0.4 and
0.35 where its options do not say."""


@pytest.mark.parametrize("options", MERGEKIT)
def test_mergekit_gives_the_same_numbers(
    options: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    edit, expected = MERGEKIT[options]
    for name, row in ROW.items():
        shutil.copytree(base_of("llama", hidden_size=8), tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["model.norm.weight"] = np.array(row, np.float32)
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    edit = {**edit, "include": ["model.norm.weight"]}
    output = apply_edits(tmp_path, tmp_path / "base", [edit])
    assert np.abs(stored(output, "model.norm.weight") - np.float32(expected)).max() < 5e-7


def test_a_weight_of_one_is_the_other_model(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of("llama", "bfloat16")
    write_partners(tmp_path, base)
    output = apply_edits(tmp_path, base, [merge({"model": "other", "weight": 1})])
    for name in Checkpoint.open(base).tensors:
        assert (stored(output, name) == stored(tmp_path / "other", name)).all()


@given(seed=st.integers(0, 99), t=st.floats(0, 1), size=st.integers(2, 9))
def test_the_arc_keeps_its_distance_from_the_origin(seed: int, t: float, size: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (v / np.linalg.norm(v) for v in rng.normal(size=(2, size)))
    mine, theirs = arc(np.array([a @ b, a @ a, b @ b]), t)
    if abs(a @ b) < 0.9995:
        point = mine * a + theirs * b
        assert np.isclose(np.linalg.norm(point), 1)
        assert np.isclose(np.arccos(np.clip(point @ a, -1, 1)), t * np.arccos(a @ b), atol=1e-6)


@pytest.mark.parametrize("sums", [[6.0, 4, 9], [-6.0, 4, 9], [5.999, 4, 9]])
def test_colinear_tensors_take_the_line(sums: list[float]) -> None:
    """Equal, opposite and almost equal directions, where sin φ is 0 or has no digits left."""
    assert arc(np.array(sums), 0.25) == (0.75, 0.25)


def test_a_tensor_of_zeros_is_at_right_angles() -> None:
    mine, theirs = arc(np.array([0.0, 0, 9]), 1 / 3)
    assert np.allclose((mine, theirs), (np.sqrt(3) / 2, 1 / 2))


@given(
    numbers=npst.arrays(np.float32, st.integers(1, 200), elements=st.floats(0, width=32)),
    density=st.floats(0.001, 1),
)
def test_the_least_number_kept_is_that_of_a_sort(numbers: Numbers, density: float) -> None:
    parts = np.array_split(numbers, 3)
    expected = np.sort(numbers)[::-1][max(1, int(density * numbers.size)) - 1]
    assert least_kept(lambda: iter(parts), density) == expected


def test_an_election_counts_weights_and_leaves_the_losers_out() -> None:
    changes = [np.array([1.0, 1, 1, 0, -1]), np.array([-3.0, -0.5, 3, 0, 1])]
    found = elected(changes, [1.0, 0.5], normalize=True)
    assert np.allclose(found, [-3, 1, 2.5 / 1.5, 0, -1])
    assert np.allclose(elected(changes, [1.0, 0.5], normalize=False), [-1.5, 1, 2.5, 0, -1])
    draw = [np.array([2.0]), np.array([-1.0])]
    assert elected(draw, [0.5, 1.0], normalize=True) == [2.0], "a draw is for +"


def test_globs_choose_what_is_merged(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of("llama")
    write_partners(tmp_path, base)
    fields = {"include": ["*.mlp.*", "model.norm.weight"], "exclude": ["*.1.*", "*up_proj*"]}
    plan = plan_of(tmp_path, base, [merge(OTHER, **fields)])
    mlp = {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "down")}
    assert set(plan.edited) == {*mlp, "model.norm.weight"}


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_only_the_rows_of_a_shared_vocabulary_are_merged(
    method: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of("llama")
    for name, size in (("other", 97), ("third", 120)):
        make("llama", tmp_path / name, 3, vocab_size=size)
    partners = [OTHER] if method == "slerp" else [OTHER, THIRD]
    edit = merge(*partners, method=method)
    with pytest.raises(InputError, match=r"shape \[97, 32\] there, here \[101, 32\] \(vocabulary"):
        plan_of(tmp_path, base, [edit])
    output = apply_edits(tmp_path, base, [{**edit, "vocabulary": "shared"}])
    for name in ("lm_head.weight", EMBED["llama"]):
        before, after = (stored(folder, name) for folder in (base, output))
        assert (before[97:] == after[97:]).all()
        assert (before[:97] != after[:97]).any(axis=1).all()


def test_a_tied_pair_stays_tied(base_of: Callable[..., Path], tmp_path: Path) -> None:
    """What is mixed of the embedding is meant for the head as well; with one that is untied, the
    head is a tensor that this model lacks."""
    base = base_of("qwen3")
    write_partners(tmp_path, base)
    plan = plan_of(tmp_path, base, [merge(OTHER)])
    assert EMBED["qwen3"] in plan.edited
    assert (plan.added, plan.config) == ((), {})
    make("qwen3", tmp_path / "untied", tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"'lm_head.weight' is only there"):
        plan_of(tmp_path, base, [merge({"model": "untied", "weight": 0.5})])
    half = merge({"model": "untied", "weight": 0.5}, exclude=["lm_head*"])
    with pytest.raises(InputError, match="say untie: true"):
        plan_of(tmp_path, base, [half])


def test_an_untied_head_is_mixed_with_a_tied_one(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of("qwen3", tie_word_embeddings=False)
    make("qwen3", tmp_path / "other", 5)
    output = apply_edits(tmp_path, base, [merge(OTHER)])
    theirs = stored(tmp_path / "other", EMBED["qwen3"]).astype(float)
    expected = 0.6 * stored(base, "lm_head.weight") + 0.4 * theirs
    assert np.abs(stored(output, "lm_head.weight") - expected).max() < 1e-6


def test_sharded_and_prefixed_partners_are_matched_by_role(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """The other file names its tensors without the prefix of the base model."""
    from safetensors.numpy import load_file, save_file

    base = base_of("gpt2")
    write_partners(tmp_path, base)
    first = apply_edits(tmp_path, base, [merge(OTHER)])
    path = tmp_path / "other" / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    save_file(tensors, path)
    shutil.move(first, tmp_path / "first")
    second = apply_edits(tmp_path, base, [merge(OTHER)])
    for name in Checkpoint.open(base).tensors:
        assert (stored(tmp_path / "first", name) == stored(second, name)).all()


def test_the_digests_of_every_partner_are_in_the_receipt(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of("llama")
    write_partners(tmp_path, base)
    plan = plan_of(tmp_path, base, [merge(OTHER)])
    assert set(plan.inputs) == {"other/config.json", "other/model.safetensors"}
    receipt = apply_plan(plan, tmp_path / "out").receipt["predicate"]
    assert receipt["inputs"] == plan.inputs
    assert receipt["tensors"][0]["edits"][0]["parameters"]["with"] == [OTHER]


def test_a_partner_outside_the_recipes_folder_needs_leave(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    write_partners(tmp_path, base_of("llama"))
    with pytest.raises(InputError, match="leaves the recipe's folder"):
        plan_of(tmp_path / "inner", base_of("llama"), [merge({**OTHER, "model": "../other"})])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "family": (merge({"model": "gpt2", "weight": 0.5}), "is of family gpt2, this is llama"),
    "sizes": (merge({"model": "wide", "weight": 0.5}), r"shape \[64, 32\] there.*; and \d+ more"),
    "layers": (merge({"model": "deep", "weight": 0.5}), r"layers\.2\..* is only there"),
    "shallow": (merge({"model": "shallow", "weight": 0.5}), r"layers\.1\..* is missing there"),
    "folder": (merge({"model": "none", "weight": 0.5}), "no such folder"),
    "sum": (merge({**OTHER, "weight": 1.1}), "sum to at most 1, .* task_arithmetic takes any"),
    "negative": (merge({**OTHER, "weight": -0.1}), "weights from 0 to 1"),
    "three": (merge(OTHER, OTHER, method="slerp"), "between two models; with names 2 others"),
    "density": (merge(OTHER, density=0.5), "no meaning with method linear"),
    "pattern": (merge(OTHER, include=["*.x"]), r"include '\*\.x' matches no tensor"),
    "nothing": (merge(OTHER, exclude=["*"]), "leave no tensor"),
    "no one": (merge(), "with"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_mixed_is_refused(
    why: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    edit, said = REFUSED[why]
    make("gpt2", tmp_path / "gpt2")
    make("llama", tmp_path / "other")
    make("llama", tmp_path / "wide", intermediate_size=64)
    make("llama", tmp_path / "deep", num_hidden_layers=3)
    make("llama", tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(InputError, match=said):
        plan_of(tmp_path, base_of("llama"), [edit])


@pytest.mark.parametrize("method", ["slerp", "ties"])
def test_no_more_than_a_band_is_read_at_a_time(
    method: str, base_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of either model, to prepare and to mix; and bands make no difference to the numbers."""
    import surgery.editor
    from surgery.checkpoint import tensorfile

    base, fields = base_of("llama"), {"density": 0.2} if method == "ties" else {}
    write_partners(tmp_path, base)
    edit = merge(OTHER, method=method, **fields)
    whole = editor_of(tmp_path, base, [edit]).unrounded(EMBED["llama"])
    sizes = []
    read_exactly = tensorfile.read_exactly

    def watched(descriptor: int, begin: int, length: int, file: str) -> bytearray:
        sizes.append(length)
        return read_exactly(descriptor, begin, length, file)

    monkeypatch.setattr(tensorfile, "read_exactly", watched)
    monkeypatch.setattr(surgery.editor, "SLAB_BYTES", 640)
    banded = editor_of(tmp_path, base, [edit]).unrounded(EMBED["llama"])
    assert np.abs(whole - banded).max() < 1e-6
    assert len(sizes) > 100
    assert max(sizes) <= 640
