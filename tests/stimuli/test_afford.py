"""Probes within a model's size: the telling ones stay, and what does not run is named."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from surgery.stimuli import Batch
from surgery.stimuli.afford import (
    LEAST_POSITIONS,
    LEAST_TOKENS,
    afford,
    cost,
    positions_for,
    shorten,
)
from surgery.stimuli.batches import CACHES, PROBES, cache_batches, position_batches, probe_batches

VOCAB, POSITIONS = 100, 2048
BILLION = 10**9


def probes(cache: bool = False, positions: int = POSITIONS) -> list[Batch]:
    found = list(cache_batches(VOCAB, positions, 0)) if cache else []
    late = reversed(list(position_batches(VOCAB, positions, 0)))
    return [*found, *probe_batches(VOCAB, positions, 0), *late]


def names(batches: tuple[Batch, ...] | list[Batch]) -> set[str]:
    return {batch.name.split(", first")[0].split(", last")[0] for batch in batches}


def test_a_small_model_keeps_every_probe() -> None:
    every = probes(cache=True)
    kept = afford(every, positions_for(70_000_000))
    assert kept.batches == tuple(every)
    assert not kept.left_out


def test_a_limit_follows_from_the_size_and_has_a_floor() -> None:
    assert positions_for(BILLION // 2) == 500
    assert positions_for(7 * BILLION) == positions_for(70 * BILLION) == LEAST_POSITIONS


def test_the_largest_model_is_asked_every_short_shape_and_its_last_position() -> None:
    kept = afford(probes(), LEAST_POSITIONS).batches
    short = {f"probe/{title}" for title, *_ in PROBES if title != "batch 5, length 13"}
    assert short <= names(kept)
    assert max(int(batch.position_ids.max()) for batch in kept) == POSITIONS - 1
    assert max(batch.input_ids.shape[1] for batch in kept if batch.position_ids[0, 0] == 0) > 17


def test_of_a_graph_with_a_cache_every_kind_of_cache_stays() -> None:
    kept = afford(probes(cache=True), LEAST_POSITIONS).batches
    one_of_two = "left padding, cache of 13, then 4"
    assert {f"probe/{title}" for title, *_ in CACHES if title != one_of_two} <= names(kept)
    long = [batch for batch in kept if batch.name.startswith("probe/cache of 511")]
    assert [batch.input_ids.shape[1] - batch.split for batch in long] == [1]


@given(st.integers(LEAST_POSITIONS, 6000), st.booleans(), st.sampled_from([64, 700, POSITIONS]))
def test_what_is_kept_fits_and_what_is_not_is_named(room: int, cache: bool, positions: int) -> None:
    every = probes(cache, positions)
    kept = afford(every, room)
    assert sum(map(cost, kept.batches)) <= room
    assert all(batch.selected.size for batch in kept.batches)
    whole = {batch.name for batch in kept.batches} & {batch.name for batch in every}
    assert whole.isdisjoint(kept.left_out)
    assert whole | set(kept.left_out) == {batch.name for batch in every}


@given(st.integers(LEAST_POSITIONS, 6000))
def test_more_room_never_asks_less(room: int) -> None:
    every = probes(cache=True)
    less, more = (sum(map(cost, afford(every, n).batches)) for n in (room, room + 64))
    assert less <= more


@given(st.integers(LEAST_TOKENS, 511))
def test_a_shortened_row_is_a_part_of_the_row(tokens: int) -> None:
    late, early = probes()[-1], next(b for b in probes() if b.input_ids.shape == (1, 512))
    for batch, part in ((late, slice(512 - tokens, 512)), (early, slice(0, tokens))):
        short = shorten(batch, tokens)
        np.testing.assert_array_equal(short.input_ids, batch.input_ids[:, part])
        np.testing.assert_array_equal(short.position_ids, batch.position_ids[:, part])
        assert short.selected.tolist() == [[0, column] for column in range(tokens)]
        assert short.name != batch.name and short.rows != batch.rows
