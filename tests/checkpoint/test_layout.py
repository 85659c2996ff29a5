"""The edited checkpoint keeps the base's files to the byte but for what was edited."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes import HEADS, NEURONS, apply_edits, make_sae, plan_of, sae_edit, weight_files
from safetensors_files import header_of

from surgery.addresses import Region
from surgery.checkpoint import INDEX, Checkpoint, Header
from surgery.checkpoint.resize import Resize
from surgery.plan import Plan

EDITS = [HEADS, {**NEURONS, "factor": 0.5}]


def sharded_base(base: Path, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model.save_pretrained(folder, max_shard_size="30KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def assert_untouched_outside(plan: Plan, output: Path) -> int:
    """Every element no region names has the bits of the base; counts the others that changed."""
    base, edited, changed = plan.base, Checkpoint.open(output), 0
    for name in base.tensors:
        free = np.ones(base.info(name).shape, bool)
        for step in plan.steps_of(name):
            free[step.target.region.slices] = False
        before, after = (bits(checkpoint, name) for checkpoint in (base, edited))
        assert (before[free] == after[free]).all(), name
        changed += int((before != after).sum())
    return changed


def bits(checkpoint: Checkpoint, name: str) -> np.ndarray[Any, Any]:
    values = checkpoint.read(name)
    return values.view(f"u{values.dtype.itemsize}")


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_shards_headers_offsets_and_other_elements_are_kept(
    family: str, dtype: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = sharded_base(base_of(family, dtype), tmp_path / "base")
    plan, output = plan_of(tmp_path, base, EDITS), apply_edits(tmp_path, base, EDITS)
    before, after = weight_files(base), weight_files(output)
    assert len(before) > 1
    assert list(before) == list(after)
    for file, data in before.items():
        start = 8 + int.from_bytes(data[:8], "little")
        assert after[file][:start] == data[:start]
        assert len(after[file]) == len(data)
    same = [INDEX, "config.json", "tokenizer.json"]
    assert all((output / file).read_bytes() == (base / file).read_bytes() for file in same)
    changed = assert_untouched_outside(plan, output)
    assert 0 < changed <= plan.edited_bytes


def test_metadata_and_odd_spacing_of_a_header_are_kept(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    source = base_of("gpt2")
    (base / "config.json").write_bytes((source / "config.json").read_bytes())
    raw, data = split((source / "model.safetensors").read_bytes())
    entries = {**json.loads(raw), "__metadata__": {"format": "pt", "by": "hand"}}
    odd = json.dumps(entries, indent=1).encode() + b" \n"
    (base / "model.safetensors").write_bytes(len(odd).to_bytes(8, "little") + odd + data)
    output = apply_edits(tmp_path, base, EDITS)
    assert split((output / "model.safetensors").read_bytes())[0] == odd
    assert header_of(output / "model.safetensors").metadata == {"format": "pt", "by": "hand"}


def split(data: bytes) -> tuple[bytes, bytes]:
    start = 8 + int.from_bytes(data[:8], "little")
    return data[8:start], data[start:]


def test_an_added_tensor_leaves_the_old_entries_where_they_are(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = sharded_base(base_of("qwen3", "bfloat16"), tmp_path / "base")
    make_sae(tmp_path / "sae", "blocks.1.hook_resid_mid", 32)
    edits = [sae_edit("orthogonalize"), sae_edit("steer_bias", (11,), strength=0.5)]
    output = apply_edits(tmp_path, base, edits, untie=True, allow_overlap=True)
    old, new = Checkpoint.open(base), Checkpoint.open(output)
    assert set(new.headers) == set(old.headers)
    for file, header in old.headers.items():
        assert list(placed(new.headers[file]))[: len(header.tensors)] == list(placed(header))
    added = set(new.tensors) - set(old.tensors)
    assert {name.split(".")[-2] for name in added} == {
        "lm_head", "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip
    assert new.config["tie_word_embeddings"] is False
    assert new.config["attention_bias"] is True
    assert new.read_bytes("lm_head.weight") == old.read_bytes("model.embed_tokens.weight")


def placed(header: Header) -> Iterator[tuple[str, int, int]]:
    start = header.data_start
    return ((info.name, info.begin - start, info.end - start) for info in header.tensors.values())


def test_the_index_counts_added_tensors(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = sharded_base(base_of("llama"), tmp_path / "base")
    make_sae(tmp_path / "sae", "blocks.0.hook_mlp_out", 32)
    output = apply_edits(tmp_path, base, [sae_edit("steer_bias")])
    before, after = (json.loads((path / INDEX).read_text()) for path in (base, output))
    added = 2 * (48 + 48 + 32)
    assert after["metadata"]["total_size"] - before["metadata"]["total_size"] == 4 * added
    parameters = [index["metadata"].get("total_parameters", 0) for index in (before, after)]
    assert parameters[1] - parameters[0] in (added, 0)
    Checkpoint.open(output)


@given(st.data())
def test_a_resize_takes_and_spreads_any_band_of_any_axis(data: st.DataObject) -> None:
    """Against numpy's own `delete` of the whole tensor; growth is pruning the other way round."""
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
    axis = data.draw(st.integers(0, len(shape) - 1))
    size = shape[axis]
    dropped = data.draw(st.sets(st.integers(0, size - 1)))
    first = data.draw(st.integers(0, shape[0] - 1))
    rows = Region.band("t", shape, 0, first, data.draw(st.integers(first + 1, shape[0])))
    whole = np.arange(1, math.prod(shape) + 1).reshape(shape)
    resize, short, long = Resize.without(axis, size, dropped), "after", "before"
    if data.draw(st.booleans()):
        by = data.draw(st.integers(0, size))
        dropped = {*range(size - by, size)}
        resize, short, long = Resize.grown(axis, size - by, by), "before", "after"
    expected = np.delete(whole, [*dropped], axis)
    assert resize.shape(short, shape) == expected.shape
    assert resize.shape(long, expected.shape) == shape
    left = resize.take(short, rows, whole[rows.slices])
    assert (left == expected[resize.region(short, rows).slices]).all()
    zeroed = whole.copy()
    zeroed[(slice(None),) * axis + ([*dropped],)] = 0
    assert (resize.spread(short, rows, left) == zeroed[rows.slices]).all()
    assert resize.region(long, rows) == rows
    for same in (resize.take, resize.spread):
        assert (same(long, rows, whole[rows.slices]) == whole[rows.slices]).all()
    missing = resize.missing("t", shape)
    assert {i for r in missing for i in range(r.start[axis], r.stop[axis])} == dropped
    both = (shape, expected.shape) if long == "before" else (expected.shape, shape)
    assert resize.fits(*both)
    assert resize.fits(*both[::-1]) is not bool(dropped)


@pytest.mark.parametrize(
    ("axis", "size", "kept"),
    [
        (2, 4, ((0, 2),)), (0, 5, ((0, 2),)), (0, 4, ((0, 5),)), (0, 4, ((2, 1), (1, 4))),
        (0, 4, ((2, 3), (0, 1))), (0, 4, ((0, 3),)), (1, 4, ((0, 2),)), (0, 4, ((1, 3), (4, 5))),
    ],
)  # fmt: skip
def test_ranges_that_are_none_do_not_fit(
    axis: int, size: int, kept: tuple[tuple[int, int], ...]
) -> None:
    assert Resize(0, 4, ((1, 3),), "before").fits((4, 4), (2, 4))
    assert Resize(0, 4, ((1, 3),), "after").fits((2, 4), (4, 4))
    assert not Resize(axis, size, kept, "before").fits((4, 4), (2, 4))
    assert not Resize(axis, size, kept, "after").fits((2, 4), (4, 4))
    assert not Resize(0, 4, ((1, 3),), "before").fits((4, 4), (2, 4, 1))
