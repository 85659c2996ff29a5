"""Further probes: within their room, inside the model, and made again from seed and name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from surgery.stimuli import Batch
from surgery.stimuli.afford import cost
from surgery.stimuli.batches import cache_batches, digest, position_batches, probe_batches
from surgery.stimuli.extra import Space, extra_batches, named

spaces = st.builds(
    Space, st.integers(2, 300), st.integers(1, 900), st.booleans(), st.booleans(), st.integers(0, 9)
)


def probes(space: Space) -> list[Batch]:
    return list(probe_batches(space.vocab, space.positions, space.seed))


@given(spaces, st.integers(0, 900), st.integers(0, 6))
def test_they_fit_their_room_and_the_model(space: Space, room: int, which: int) -> None:
    found = list(extra_batches(probes(space)[which % 7], space, room))
    assert sum(map(cost, found)) <= room
    for batch in found:
        assert batch.input_ids.max() < space.vocab
        assert 0 <= batch.position_ids.min() <= batch.position_ids.max() < space.positions
        assert space.late or batch.position_ids.max() < batch.input_ids.shape[1]
        assert batch.split == 0 or (space.cache and 0 < batch.split < batch.input_ids.shape[1])
        assert batch.attention_mask[0].any()


@given(spaces, st.integers(0, 6))
def test_each_is_made_again_from_its_name(space: Space, which: int) -> None:
    known = {batch.name: batch for batch in probes(space)}
    found = list(extra_batches(probes(space)[which % 7], space, 300))
    for batch in found:
        for name in (batch.name, *batch.rows):
            again = named(name, known, space)
            assert again is not None and digest([again]) == digest([batch])
    if found and space.vocab > 100:
        other = replace(space, seed=space.seed + 1)
        assert digest(list(extra_batches(probes(space)[which % 7], other, 300))) != digest(found)


def test_every_other_one_is_the_worst_batch_with_other_tokens() -> None:
    space = Space(100, 2048, late=True, cache=True, seed=0)
    late = list(position_batches(100, 2048, 0))[-1]
    cached = next(iter(cache_batches(100, 2048, 0)))
    for like in (late, cached, probes(space)[3]):
        found = list(extra_batches(like, space, 5 * cost(like) + 5000))[::2]
        assert len(found) > 1
        for batch in found:
            for field in ("attention_mask", "position_ids", "selected", "split"):
                np.testing.assert_array_equal(getattr(batch, field), getattr(like, field))
        assert len({batch.input_ids.tobytes() for batch in [*found, like]}) > len(found)


def test_the_others_come_in_every_padding_place_and_cache() -> None:
    space = Space(100, 2048, late=True, cache=True, seed=0)
    found = list(extra_batches(probes(space)[0], space, 40_000))[1::2]
    masks = [batch.attention_mask for batch in found]
    assert any(mask.all() for mask in masks) and any(not mask.any(axis=1).all() for mask in masks)
    assert any(batch.position_ids[0, 0] > 512 for batch in found)
    assert any(batch.split for batch in found)
