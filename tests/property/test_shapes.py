"""Laws of edits on models of any shape: what does nothing, what comes in turn, what comes back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import random, write_vector
from models import make
from oracles import NOISE_FACTOR, load_model, logits, noise
from recipes import apply_edits, make_sae, sae_edit, snapshot, stored, weight_files, write_recipe

from surgery import api
from surgery.arch import identify
from surgery.checkpoint import Checkpoint

Edit = dict[str, Any]
SIZES = st.integers(1, 3)
DIRECTION = {"op": "direction", "vector": {"file": "d.safetensors", "key": "d"}}


@dataclass(frozen=True)
class Shape:
    """A family and a config of it: every size is drawn by itself."""

    family: str
    layers: int
    groups: int
    per_group: int
    half_dim: int
    extra: int
    neurons: int
    dtype: str

    @property
    def heads(self) -> int:
        return self.groups * self.per_group

    @property
    def width(self) -> int:
        """Of gpt2 what its heads have together, of qwen3 anything."""
        own = self.family == "gpt2"
        return 2 * self.heads * self.half_dim if own else 2 * self.heads + self.extra

    def config(self) -> dict[str, int]:
        if self.family == "gpt2":
            sizes = {"n_layer": self.layers, "n_embd": self.width, "n_head": self.heads}
            return {**sizes, "n_inner": self.neurons}
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": 2 * self.half_dim,
            "intermediate_size": self.neurons,
        }

    @contextmanager
    def made(self) -> Iterator[tuple[Path, Path]]:
        """A random model of this shape, and a folder with a direction and an autoencoder of its
        width; tensors are edited in bands of a few rows."""
        bands = patch("surgery.editor.SLAB_BYTES", 200)
        with tempfile.TemporaryDirectory() as folder, bands:
            base = make(self.family, Path(folder) / "base", dtype=self.dtype, **self.config())
            work = Path(folder) / "work"
            make_sae(work / "sae", "blocks.0.hook_resid_post", self.width)
            write_vector(work, base)
            yield base, work


def shapes(*families: str, dtypes: tuple[str, ...] = ("float32",)) -> st.SearchStrategy[Shape]:
    return st.builds(
        Shape,
        family=st.sampled_from(families),
        layers=SIZES,
        groups=SIZES,
        per_group=SIZES,
        half_dim=SIZES,
        extra=st.integers(1, 9),
        neurons=st.integers(2, 17),
        dtype=st.sampled_from(dtypes),
    )


STORED = ("float32", "bfloat16", "float16")


def edits_of(shape: Shape, amount: float, seed: int) -> dict[str, Edit]:
    """One edit of every op that acts by an amount, at places drawn by `seed`; 1 does nothing."""
    rng = np.random.default_rng(seed)
    layer, head, neuron = (int(rng.integers(n)) for n in (shape.layers, shape.heads, shape.neurons))
    away = 1 - amount
    place = f"L{layer}H{head}"
    return {
        "heads": {"op": "heads", "heads": [place], "factor": amount},
        "neurons": {"op": "neurons", "neurons": [f"L{layer}N{neuron}"], "factor": amount},
        "layers": {"op": "layers", "layers": [layer], "factor": amount},
        "direction": {**DIRECTION, "strength": away},
        "columns": {**DIRECTION, "strength": away, "keep_norms": "columns"},
        "orthogonalize": sae_edit("orthogonalize", (0, 3)[: shape.width - 1], strength=away),
        "head_spectrum": {
            "op": "head_spectrum",
            "heads": [place],
            "components": [0],
            "factor": amount,
        },
        "lm_head_spectrum": {"op": "lm_head_spectrum", "components": [0], "factor": amount},
    }


NAMES = st.sampled_from(sorted(edits_of(Shape("gpt2", 1, 1, 1, 1, 1, 2, "float32"), 1, 0)))
SEEDS = st.integers(0, 99)
AMOUNTS = st.sampled_from([0.5, -1.5, 2.0])
"""Not 0: of a head that is gone, a later edit finds no spectrum and says so."""
few = settings(max_examples=25)


@few
@given(shape=shapes("gpt2", "qwen3", dtypes=STORED), name=NAMES, seed=SEEDS)
def test_a_factor_of_one_and_a_strength_of_zero_change_no_bit(
    shape: Shape, name: str, seed: int
) -> None:
    with shape.made() as (base, work):
        output = apply_edits(work, base, [edits_of(shape, 1.0, seed)[name]], untie=True)
        for tensor in Checkpoint.open(base).tensors:
            assert stored(output, tensor).tobytes() == stored(base, tensor).tobytes()


@few
@given(
    shape=shapes("gpt2", "qwen3"),
    names=st.lists(NAMES, min_size=2, max_size=3),
    amounts=st.tuples(AMOUNTS, AMOUNTS, AMOUNTS),
    seed=SEEDS,
)
def test_edits_of_one_recipe_are_recipes_one_after_the_other(
    shape: Shape, names: list[str], amounts: tuple[float, ...], seed: int
) -> None:
    """To the bit where float32 is stored, since float32 is what each edit hands to the next."""
    with shape.made() as (base, work):
        edits = [edits_of(shape, a, seed)[n] for n, a in zip(names, amounts, strict=False)]
        options = {"untie": True, "allow_overlap": True}
        expected = base
        for number, edit in enumerate(edits):
            (work / str(number)).mkdir()
            for path in ("sae", "d.safetensors"):
                (work / str(number) / path).symlink_to(work / path)
            recipe = write_recipe(work / str(number), [edit], **options)
            output = work / f"out-{number}"
            api.apply(recipe, expected, output, allow_outside=True)
            expected = output
        found = apply_edits(work, base, edits, **options)
        assert weight_files(found) == weight_files(expected)


@few
@given(shape=shapes("gpt2", "qwen3", dtypes=("float32", "float64")))
def test_nothing_that_is_written_is_left_along_a_direction(shape: Shape) -> None:
    """rᵀW' is the rounding of what is stored."""
    with shape.made() as (base, work):
        r = random(shape.width, size=3.0).astype(np.float64)
        r /= np.linalg.norm(r)
        output = apply_edits(work, base, [DIRECTION], untie=True)
        arch = identify(Checkpoint.open(output))
        writers = list(arch.writers(range(shape.layers), outside_blocks=True))
        assert len(writers) > 2 * shape.layers
        for writer in writers:
            before, after = (
                np.tensordot(r, stored(folder, writer.tensor).astype(np.float64), (0, writer.axis))
                for folder in (base, output)
            )
            limit = 1e-6 if shape.dtype == "float32" else 1e-14
            assert np.abs(after).max() <= limit * (1 + np.abs(before).max()), writer.tensor


@few
@given(shape=shapes("qwen3"), kept=st.tuples(SIZES, SIZES), neurons=SIZES)
def test_a_model_without_heads_and_neurons_is_the_one_with_them_zero(
    shape: Shape, kept: tuple[int, int], neurons: int
) -> None:
    """Whole groups and single heads of those that stay; neurons of every layer."""
    groups, per_group = min(kept[0], shape.groups), min(kept[1], shape.per_group)
    heads = [
        f"L{layer}H{head}"
        for layer in range(shape.layers)
        for head in range(shape.heads)
        if head // shape.per_group >= groups or head % shape.per_group >= per_group
    ]
    gone = [f"L{layer}N{n}" for layer in range(shape.layers) for n in range(neurons)]
    edits: list[Edit] = [{"op": "neurons", "neurons": gone}] if neurons < shape.neurons else []
    edits += [{"op": "heads", "heads": heads}] if heads else []
    if not edits:
        return
    with shape.made() as (base, work):
        zero = apply_edits(work / "zero", base, edits)
        pruned = apply_edits(work, base, [{**edit, "prune": True} for edit in edits])
        difference = logits(load_model(pruned)) - logits(load_model(zero))
        assert np.abs(difference).max() <= NOISE_FACTOR * noise(base)
        sizes = identify(Checkpoint.open(pruned)).sizes
        assert (sizes["heads"], sizes["kv_heads"]) == (groups * per_group, groups)


@few
@given(
    shape=shapes("gpt2", "qwen3", dtypes=STORED),
    names=st.lists(NAMES, min_size=1, max_size=3, unique=True),
    amount=AMOUNTS,
    seed=SEEDS,
)
def test_every_file_comes_back_to_the_byte(
    shape: Shape, names: list[str], amount: float, seed: int
) -> None:
    with shape.made() as (base, work):
        edits = [edits_of(shape, amount, seed)[name] for name in names]
        recipe = write_recipe(work, edits, untie=True, allow_overlap=True)
        delta = work / "delta.safetensors"
        api.apply(recipe, base, work / "edited", delta=delta)
        api.revert(work / "edited", delta, work / "back")
        api.apply(delta, base, work / "again")
        for one, other in ((base, work / "back"), (work / "edited", work / "again")):
            assert {n: data for n, (data, _) in snapshot(one).items()} == {
                n: data for n, (data, _) in snapshot(other).items()
            }
