"""Batches: padding as transformers pads, real positions only, named by everything in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.stimuli import Batch, Stimulus
from surgery.stimuli.batches import (
    BATCH_BYTES,
    CACHES,
    LONGEST_PROBE,
    PROBES,
    ROWS,
    cache_batches,
    digest,
    last_positions,
    pad,
    position_batches,
    probe_batches,
    prompt_batches,
    within_budget,
)

VOCAB, POSITIONS = 50, 64

rows = st.lists(
    st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=9).map(tuple), min_size=1, max_size=6
)
sides = st.sampled_from(["left", "right"])


def padded(ids: list[tuple[int, ...]], side: Any = "left") -> Batch:
    return pad("b", "probe", ids, side, tuple(f"row {n}" for n in range(len(ids))))


def probes(vocab: int = VOCAB, positions: int = POSITIONS, seed: int = 0) -> list[Batch]:
    return list(probe_batches(vocab, positions, seed))


# -------------------------------------------------------------------------------------- padding


@given(rows, sides)
def test_padding_keeps_the_tokens_and_masks_the_rest(ids: list[tuple[int, ...]], side: str) -> None:
    batch = padded(ids, side)
    for row, own in enumerate(ids):
        real = batch.attention_mask[row] == 1
        assert tuple(batch.input_ids[row, real]) == own
        assert not batch.input_ids[row, ~real].any()
        assert batch.position_ids[row, real].tolist() == list(range(len(own)))
        assert not batch.position_ids[row, ~real].any()
        edge = -1 if side == "left" else 0
        assert real[edge], "padding is on the other side"


@given(rows, sides)
def test_exactly_the_real_positions_are_selected(ids: list[tuple[int, ...]], side: str) -> None:
    batch = padded(ids, side)
    assert len(batch.selected) == sum(map(len, ids))
    assert (batch.attention_mask[batch.selected[:, 0], batch.selected[:, 1]] == 1).all()


@given(rows, sides)
def test_the_last_position_is_that_of_the_last_token(ids: list[tuple[int, ...]], side: str) -> None:
    batch = padded(ids, side)
    last = batch.input_ids[np.arange(len(ids)), last_positions(batch)]
    assert last.tolist() == [own[-1] for own in ids]


def test_padding_and_positions_are_those_generate_uses(base_of: Callable[..., Path]) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel.from_pretrained(base_of("gpt2")).eval()
    batch = padded([(5, 6, 7, 8), (9, 10)])
    seen: dict[str, Any] = {}

    def note(module: Any, arguments: Any, given: dict[str, Any]) -> None:
        seen.update({name: given[name] for name in ("input_ids", "position_ids")})

    model.register_forward_pre_hook(note, with_kwargs=True)
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1, do_sample=False)
    for name, used in seen.items():
        np.testing.assert_array_equal(used.numpy(), getattr(batch, name))


# --------------------------------------------------------------------------------------- probes


def test_probes_have_the_shapes_a_trace_bakes_in() -> None:
    shapes = {batch.input_ids.shape for batch in probes()}
    sides = {
        (bool(b.attention_mask[:, 0].all()), bool(b.attention_mask[:, -1].all())) for b in probes()
    }
    assert {(1, 1), (1, 5), (5, 13), (3, 17), (3, 11), (3, 7), (1, POSITIONS)} == shapes
    assert sides >= {(True, True), (False, True), (True, False)}, "none, left and right padding"
    assert (2, 7) not in shapes, "the shape that is traced"


def test_a_probe_has_padding_between_real_tokens() -> None:
    batch = next(batch for batch in probes() if batch.name == "probe/batch 3, holes")
    mask = batch.attention_mask
    assert mask[0].all() and not mask[1:, 0].any(), "one row without, the others from the start on"
    for row in mask[1:]:
        between = row[np.argmax(row) : len(row) - np.argmax(row[::-1])]
        assert (between == 0).any(), "a hole between real tokens"
    np.testing.assert_array_equal(batch.position_ids, (mask.cumsum(axis=1) - 1).clip(0) * mask)


def test_a_probe_has_a_row_of_padding_alone_beside_others() -> None:
    batch = next(batch for batch in probes() if batch.name == "probe/batch 3, a masked row")
    assert batch.attention_mask.any(axis=1).tolist() == [True, False, True]
    assert set(batch.selected[:, 0].tolist()) == {0, 2}, "nothing of it is compared"
    assert not batch.input_ids[1].any() and not batch.position_ids[1].any()


def test_a_model_with_few_positions_gets_probes_that_fit() -> None:
    assert {batch.input_ids.shape[1] for batch in probes(positions=8)} == {1, 5, 7, 8}
    for positions in (1, 5):
        names = [batch.name for batch in probes(positions=positions)]
        assert len(set(names)) == len(names) == len(PROBES), "the long one is there already"


def test_a_model_with_many_positions_gets_a_bounded_probe() -> None:
    assert max(batch.input_ids.shape[1] for batch in probes(positions=10**6)) == LONGEST_PROBE


@given(st.integers(2, 500), st.integers(1, 80), st.integers(0, 5))
def test_probes_stay_inside_vocabulary_and_positions(vocab: int, positions: int, seed: int) -> None:
    for batch in probes(vocab, positions, seed):
        assert 0 <= batch.input_ids.min() <= batch.input_ids.max() < vocab
        assert batch.position_ids.max() < positions
        assert batch.attention_mask[0].all(), "nothing to compare"
        if positions > 1 and "masked row" not in batch.name:
            assert batch.attention_mask.any(axis=1).all(), "a row without a token"


def test_the_same_seed_gives_the_same_probes_and_another_seed_others() -> None:
    assert digest(probes(seed=3)) == digest(probes(seed=3))
    assert digest(probes(seed=3)) != digest(probes(seed=4))


def test_names_of_probes_and_rows_are_unique() -> None:
    """A finding names them."""
    found = probes()
    names = [batch.name for batch in found]
    titles = [row for batch in found for row in batch.rows]
    assert len(set(names)) == len(names)
    assert len(set(titles)) == len(titles)


@given(st.integers(1, 300))
def test_a_cache_is_filled_by_real_tokens_of_every_row_and_then_read(positions: int) -> None:
    found = list(cache_batches(VOCAB, positions, seed=0))
    names = [batch.name for batch in [*found, *probes(positions=positions)]]
    assert len(set(names)) == len(names)
    assert bool(found) is (positions > 1)
    for batch in found:
        rows, columns = batch.input_ids.shape
        assert 0 < batch.split < columns <= min(positions, LONGEST_PROBE)
        assert batch.attention_mask[:, : batch.split].any(axis=1).all()
        following = batch.attention_mask[:, batch.split :]
        assert following.all() or ("holes" in batch.name and following.any(axis=1).all())
        assert len(batch.rows) == rows


def test_caches_are_short_long_and_padded_and_one_token_or_more_follows() -> None:
    found = list(cache_batches(VOCAB, POSITIONS, seed=0))
    assert len(found) == len(CACHES) + 1
    shapes = {(b.split, b.input_ids.shape[1] - b.split) for b in found}
    assert shapes >= {(1, 1), (5, 4), (POSITIONS - 1, 1)}
    padded = {b.input_ids.shape[1] - b.split for b in found if not b.attention_mask.all()}
    assert padded == {1, 2, 4}
    assert digest(found) != digest(list(cache_batches(VOCAB, POSITIONS, seed=1)))


# -------------------------------------------------------------------------------------- prompts


def test_prompts_are_batched_by_set_and_length_and_none_is_lost() -> None:
    generator = np.random.default_rng(0)
    stimuli = [Stimulus(f"{n}", ("target", "preserve")[n % 2], input_ids=(1,)) for n in range(45)]
    tokens = {s.id: tuple(generator.integers(1, 9, generator.integers(1, 12))) for s in stimuli}
    batches = list(prompt_batches(stimuli, tokens))
    assert [b.stimulus_set for b in batches] == ["target"] * 2 + ["preserve"] * 2
    assert max(len(b.rows) for b in batches) == ROWS
    assert sorted(row for b in batches for row in b.rows) == sorted(tokens)
    for batch in batches:
        for row, name in enumerate(batch.rows):
            real = batch.attention_mask[row] == 1
            assert tuple(batch.input_ids[row, real]) == tokens[name]


# --------------------------------------------------------------------------------------- budget


@given(st.lists(rows, min_size=1, max_size=3), st.integers(0, 120), st.integers(0, 3))
def test_the_budget_holds_and_last_positions_stay(
    groups: list[list[tuple[int, ...]]], positions: int, seed: int
) -> None:
    batches = [replace(padded(ids), name=f"{n}") for n, ids in enumerate(groups)]
    kept = within_budget(batches, 10, positions * 10 + 9, seed)
    before = sum(len(batch.selected) for batch in batches)
    last = sum(len(batch.rows) for batch in batches)
    assert sum(len(batch.selected) for batch in kept) == min(before, max(positions, last))
    for batch, sample in zip(batches, kept, strict=True):
        own = {tuple(position) for position in sample.selected.tolist()}
        assert own <= {tuple(position) for position in batch.selected.tolist()}
        assert own >= set(enumerate(last_positions(batch).tolist()))
        assert sample.selected.tolist() == sorted(sample.selected.tolist())


def test_the_sample_follows_the_seed() -> None:
    batches = probes()
    first, again, other = (within_budget(batches, 1, 60, seed) for seed in (0, 0, 1))
    assert digest(first) == digest(again) != digest(other)


# --------------------------------------------------------------------------------------- digest


@given(st.sampled_from([field.name for field in fields(Batch)]), st.integers(0, 10**6))
def test_the_digest_changes_with_any_field(name: str, where: int) -> None:
    batch = padded([(5, 6, 7), (8, 9)])
    value = getattr(batch, name)
    if isinstance(value, np.ndarray):
        value = value.copy()
        value.flat[where % value.size] += 1
    else:
        others = {tuple: (*batch.rows[:-1], "another"), int: 1}
        value = others.get(type(value), f"{value}x")
    assert digest([replace(batch, **{name: value})]) != digest([batch])


def test_the_digest_knows_shapes_order_and_number_of_batches() -> None:
    a, b = padded([(5, 6, 7, 8)]), padded([(1, 2)])
    flat = {f.name: getattr(a, f.name) for f in fields(a)}
    square = Batch(**{**flat, "input_ids": a.input_ids.reshape(2, 2)})
    assert len({digest(x) for x in ([a], [square], [a, b], [b, a], [])}) == 5


@pytest.mark.parametrize(("positions", "rows"), [(512, 0), (513, 1), (2048, 3), (1 << 17, 4)])
def test_positions_past_the_longest_probe_are_covered_or_sampled(positions: int, rows: int) -> None:
    batches = list(position_batches(101, positions, 0))
    assert len(batches) == rows
    seen = {int(p) for batch in batches for p in batch.position_ids.ravel()}
    if rows:
        assert max(seen) == positions - 1
    if 0 < rows < 4:
        assert seen == set(range(min(seen), positions))
        assert min(seen) <= LONGEST_PROBE


def test_a_large_vocabulary_makes_batches_of_fewer_rows() -> None:
    stimuli = [Stimulus(str(n), "target", input_ids=(1,) * 100) for n in range(8)]
    tokens = {stimulus.id: (1,) * 100 for stimulus in stimuli}
    sizes = [len(batch.rows) for batch in prompt_batches(stimuli, tokens, 4 * 150_000)]
    assert sum(sizes) == 8
    assert max(sizes) * 100 * 4 * 150_000 <= BATCH_BYTES
