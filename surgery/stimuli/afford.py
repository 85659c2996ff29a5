"""How much of the probes a large model is asked: the most telling ones, within a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from surgery.stimuli.interface import Batch

PROBE_FLOPS = 5e11
"""Floating-point operations a corner may spend on probes, at 2 for each parameter and position.

About ten seconds of float64 on two cores (50 GFLOP/s). Models of up to 70 million parameters keep
every probe.
"""

LEAST_POSITIONS = 256
"""What every model is asked, however large: all short probes, and a few tokens of long rows."""

LONG = 64
"""Rows of more tokens than this can be shortened."""

LEAST_TOKENS = 16
"""The shortest that a long row is made."""

LONG_ROWS = 4
"""Long rows for which room is kept: text, a long one, the last positions, a long cache."""


@dataclass(frozen=True)
class Afforded:
    """`batches` to run, in the order they were given; `left_out`: why a batch is not among them,
    or not in full, by its name."""

    batches: tuple[Batch, ...]
    left_out: dict[str, str]


def positions_for(parameters: int) -> int:
    """Positions of probes for a model of that many parameters, padding included."""
    return max(LEAST_POSITIONS, int(PROBE_FLOPS // (2 * parameters)))


def afford(batches: Sequence[Batch], positions: int) -> Afforded:
    """As much of `batches` as fits in `positions`, rows × columns.

    Each probe is of a kind of its own, so the short ones come first, the cheapest before all, and
    among equals in the order given. What they leave is shared evenly among as many long rows, in
    the order given, as get 16 tokens each; room for four of those is kept.
    """
    if sum(map(cost, batches)) <= positions:
        return Afforded(tuple(batches), {})
    long = [batch for batch in batches if _is_long(batch)]
    short = sorted((batch for batch in batches if not _is_long(batch)), key=cost)
    room = positions - LEAST_TOKENS * min(len(long), LONG_ROWS)
    kept: dict[str, Batch] = {}
    for batch in short:
        if cost(batch) <= room:
            room -= cost(batch)
            kept[batch.name] = batch
    room += LEAST_TOKENS * min(len(long), LONG_ROWS)
    kept |= _shared(long, room)
    told = {batch.name: _why(batch, kept.get(batch.name), positions) for batch in batches}
    found = tuple(kept[batch.name] for batch in batches if batch.name in kept)
    return Afforded(found, {name: why for name, why in told.items() if why})


def cost(batch: Batch) -> int:
    """Positions that are computed, padding included."""
    return batch.input_ids.size


def shorten(batch: Batch, tokens: int) -> Batch:
    """A batch of one unpadded row with `tokens` of it: the last ones where it begins past
    position 0, as those near the model's last position are what it is for, else the first."""
    columns = batch.input_ids.shape[1]
    late = bool(batch.position_ids[0, 0])
    span = slice(columns - tokens, columns) if late else slice(0, tokens)
    end = f", {'last' if late else 'first'} {tokens}"
    return replace(
        batch,
        name=batch.name + end,
        input_ids=batch.input_ids[:, span],
        attention_mask=batch.attention_mask[:, span],
        position_ids=batch.position_ids[:, span],
        selected=batch.selected[:tokens],
        rows=tuple(row + end for row in batch.rows),
        split=batch.split - (columns - tokens) if batch.split else 0,
    )


def _is_long(batch: Batch) -> bool:
    return len(batch.input_ids) == 1 and cost(batch) > LONG


def _shared(long: Sequence[Batch], room: int) -> dict[str, Batch]:
    """By its own name each row that `room` has 16 tokens for, as long as its share."""
    number = min(len(long), room // LEAST_TOKENS)
    kept: dict[str, Batch] = {}
    for batch in long[:number]:
        share = room // (number - len(kept))
        tokens = min(share, cost(batch))
        room -= tokens
        kept[batch.name] = batch if tokens == cost(batch) else shorten(batch, tokens)
    return kept


def _why(batch: Batch, kept: Batch | None, positions: int) -> str:
    if kept is batch:
        return ""
    limit = f"a model of this size is asked {positions:,} positions of probes"
    return f"shortened to {cost(kept)} tokens: {limit}" if kept else limit
