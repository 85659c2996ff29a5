"""Further probes for time that is left, each made anew from the seed and its own name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from surgery.stimuli.afford import cost
from surgery.stimuli.batches import KINDS, LONGEST_PROBE, drawn, mask_of
from surgery.stimuli.interface import Batch

MOST_ROWS = 4
_NAME = re.compile(r"(?:probe/)?extra (\d+)(?:, as (.*?))?(?:, row \d+)?")


@dataclass(frozen=True)
class Space:
    """What probes of a model can be: tokens below `vocab`, `positions` of them in a row; `late`:
    rows may begin past position 0; `cache`: batches may run in two parts."""

    vocab: int
    positions: int
    late: bool
    cache: bool
    seed: int


def extra_batches(worst: Batch, space: Space, room: int) -> Iterator[Batch]:
    """Probes of no more than `room` positions, padding included.

    Every other one is `worst`, the batch with the largest error so far, with new tokens: its
    shape, padding, positions and cache are what an error most likely depends on. The others are
    of random shape, padding, positions and cache.
    """
    number = 1
    while True:
        batch = _again(number, worst, space) if number % 2 else _random(number, space)
        room -= cost(batch)
        if room < 0:
            return
        yield batch
        number += 1


def named(name: str, known: Mapping[str, Batch], space: Space) -> Batch | None:
    """The extra probe of that name, or with a row of that name; None if it is none. `known`: other
    batches by name."""
    found = _NAME.fullmatch(name)
    if found is None or (found[2] is not None and found[2] not in known):
        return None
    number = int(found[1])
    return _random(number, space) if found[2] is None else _again(number, known[found[2]], space)


def _again(number: int, like: Batch, space: Space) -> Batch:
    """The batch `like` with other tokens."""
    title = f"extra {number}, as {like.name}"
    batch = drawn(title, like.attention_mask, space.vocab, _generator(number, space))
    return replace(batch, position_ids=like.position_ids, split=like.split)


def _random(number: int, space: Space) -> Batch:
    generator = _generator(number, space)

    def pick(low: int, high: int) -> int:
        return int(generator.integers(low, high, endpoint=True))

    rows, columns = pick(1, MOST_ROWS), pick(1, min(space.positions, LONGEST_PROBE))
    padding = KINDS[pick(0, len(KINDS) - 1)]
    mask = mask_of(rows, columns, padding)
    batch = drawn(f"extra {number}", mask, space.vocab, generator)
    if not mask.all():
        return batch
    first = pick(0, space.positions - columns) if space.late else 0
    split = pick(1, columns - 1) if space.cache and columns > 1 else 0
    return replace(batch, position_ids=batch.position_ids + first, split=split)


def _generator(number: int, space: Space) -> np.random.Generator:
    # A third number, since those of other probes have two.
    return np.random.default_rng((space.seed, number, MOST_ROWS))
