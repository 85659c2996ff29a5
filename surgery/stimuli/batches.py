"""Rectangular batches: prompts padded left, and seeded probes of shapes no trace has seen.

A probe's padding is on one side, `holes` between real tokens, or a `masked row`: a row of nothing
but padding, beside others that it must leave alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from surgery.stimuli.interface import Batch, Stimulus

ROWS = 16
LONGEST_PROBE = 512
POSITION_ROWS = 4
BATCH_BYTES = 256 << 20
"""Largest output of one batch; a large vocabulary makes batches of fewer rows."""

Side = Literal["left", "right"]
Padding = Literal["none", "left", "right", "holes", "masked row"]
KINDS: tuple[Padding, ...] = get_args(Padding)

PROBES: tuple[tuple[str, int, int, Padding], ...] = (
    ("batch 1, length 1", 1, 1, "none"),
    ("batch 1, length 5", 1, 5, "none"),
    ("batch 5, length 13", 5, 13, "none"),
    ("batch 3, left padding", 3, 17, "left"),
    ("batch 3, right padding", 3, 17, "right"),
    ("batch 3, holes", 3, 11, "holes"),
    ("batch 3, a masked row", 3, 7, "masked row"),
)
"""Name, rows, columns and padding of each seeded probe; none has the shape that is traced."""


CACHES: tuple[tuple[str, int, int, int, Padding], ...] = (
    ("cache of 1, then 1", 1, 1, 1, "none"),
    ("cache of 5, then 4", 3, 5, 4, "none"),
    ("left padding, cache of 16, then 1", 3, 16, 1, "left"),
    ("left padding, cache of 13, then 4", 3, 13, 4, "left"),
    ("holes, cache of 9, then 2", 3, 9, 2, "holes"),
)
"""Name, rows, columns that fill the cache, columns that follow, and padding, for graphs with a
cache; every row has real tokens in its cache."""


def prompt_batches(
    stimuli: Sequence[Stimulus], tokens: Mapping[str, tuple[int, ...]], position_bytes: int = 4
) -> Iterator[Batch]:
    """The prompts of each set in batches of at most 16 rows of similar length, padded left.

    `position_bytes` is the size of one position's output in float32.
    """
    for name in dict.fromkeys(stimulus.set for stimulus in stimuli):
        ids = sorted((s.id for s in stimuli if s.set == name), key=lambda i: len(tokens[i]))
        for number, rows in enumerate(_rows_that_fit(ids, tokens, position_bytes)):
            yield pad(f"{name}/{number}", name, [tokens[row] for row in rows], "left", rows)


def _rows_that_fit(
    ids: list[str], tokens: Mapping[str, tuple[int, ...]], position_bytes: int
) -> Iterator[tuple[str, ...]]:
    """`ids`, shortest first, in groups whose outputs stay within `BATCH_BYTES`."""
    while ids:
        room = BATCH_BYTES // (position_bytes * len(tokens[ids[-1]]))
        size = max(1, min(ROWS, room))
        yield tuple(ids[:size])
        ids = ids[size:]


def probe_batches(vocab: int, positions: int, seed: int) -> Iterator[Batch]:
    """Seeded random tokens in every shape of `PROBES` that fits, and one long row."""
    generator = np.random.default_rng(seed)
    longest = min(positions, LONGEST_PROBE)
    long: tuple[str, int, int, Padding] = (f"batch 1, length {longest}", 1, longest, "none")
    shapes = PROBES if long in PROBES else (*PROBES, long)
    for title, rows, columns, padding in shapes:
        mask = mask_of(rows, min(columns, positions), padding)
        yield drawn(title, mask, vocab, generator)


def position_batches(vocab: int, positions: int, seed: int) -> Iterator[Batch]:
    """Seeded random tokens at positions past the longest probe, one row a batch.

    Rows of consecutive position ids cover the rest of the range, or, where that would take more
    than 4 rows, sample it evenly; the last positions are always there.
    """
    generator = np.random.default_rng((seed, positions))
    starts = np.arange(LONGEST_PROBE, positions, LONGEST_PROBE)
    spread = np.linspace(0, len(starts) - 1, min(len(starts), POSITION_ROWS))
    for start in starts[spread.astype(int)].tolist():
        first = min(start, positions - LONGEST_PROBE)
        ids = tuple(generator.integers(0, vocab, LONGEST_PROBE).tolist())
        name = f"positions {first} to {first + LONGEST_PROBE - 1}"
        batch = pad(f"probe/{name}", "probe", [ids], "left", (name,))
        yield replace(batch, position_ids=batch.position_ids + first)


def cache_batches(vocab: int, positions: int, seed: int) -> Iterator[Batch]:
    """Seeded random tokens in every shape of `CACHES` that fits, and one token over a long cache:
    batches to run in two parts, the first of which fills the cache of the second."""
    generator = np.random.default_rng((seed, len(CACHES)))
    longest = min(positions, LONGEST_PROBE) - 1
    shapes = [*CACHES, (f"cache of {longest}, one more", 1, longest, 1, "none")]
    for title, rows, cached, following, padding in shapes:
        columns = cached + following
        if cached and columns <= positions:
            batch = drawn(title, mask_of(rows, columns, padding), vocab, generator)
            yield replace(batch, split=cached)


def drawn(title: str, mask: NDArray[np.int64], vocab: int, generator: np.random.Generator) -> Batch:
    """A probe of random tokens where `mask` is 1."""
    ids = [tuple(generator.integers(0, vocab, n).tolist()) for n in mask.sum(axis=1)]
    names = tuple(f"{title}, row {row}" for row in range(len(mask)))
    return fill(f"probe/{title}", "probe", ids, mask, names)


def mask_of(rows: int, columns: int, padding: Padding) -> NDArray[np.int64]:
    """int64 [rows, columns]; the first row is never padded. Row n has a hole at every (n+1)th
    column, from the first on; of a masked row's neighbours the last is padded left too."""
    mask = np.ones((rows, columns), np.int64)
    for row in range(1, rows):
        if padding == "holes":
            mask[row, :: row + 1] = 0
        elif padding == "masked row":
            mask[row, : columns if row == 1 else columns // rows] = 0
        elif padding != "none":
            short = min(row * (columns // rows), columns - 1)
            mask[row, slice(0, short) if padding == "left" else slice(columns - short, None)] = 0
    return mask


def pad(
    name: str,
    stimulus_set: str,
    ids: Sequence[tuple[int, ...]],
    side: Side,
    rows: tuple[str, ...],
) -> Batch:
    """`ids` as one batch padded with token 0 on `side`; every real position selected."""
    lengths = np.array([[len(row)] for row in ids])
    columns = np.arange(lengths.max())
    real = columns >= lengths.max() - lengths if side == "left" else columns < lengths
    return fill(name, stimulus_set, ids, real.astype(np.int64), rows)


def fill(
    name: str,
    stimulus_set: str,
    ids: Sequence[tuple[int, ...]],
    mask: NDArray[np.int64],
    rows: tuple[str, ...],
) -> Batch:
    """The tokens `ids` of each row in the columns where `mask`, int64 [batch, length], is 1, and
    token 0 elsewhere; every real position selected.

    Positions count real tokens from 0 (`cumsum(mask) - 1`, as `generate` does); padding gets 0.
    """
    tokens = np.zeros_like(mask)
    tokens[mask == 1] = [token for row in ids for token in row]
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0) * mask
    return Batch(name, stimulus_set, tokens, mask, positions, np.argwhere(mask == 1), rows)


def within_budget(
    batches: Sequence[Batch], position_bytes: int, budget: int, seed: int
) -> list[Batch]:
    """`batches` with as many selected positions as fit in `budget` bytes of output.

    `position_bytes` is the size of one position's output. The last real position of every row
    always stays, even past the budget; of the others, a seeded sample.
    """
    kept = [_is_last(batch) for batch in batches]
    room = budget // position_bytes - sum(int(last.sum()) for last in kept)
    others = [(number, index) for number, last in enumerate(kept) for index in np.where(~last)[0]]
    if len(others) <= room:
        return list(batches)
    order = np.random.default_rng(seed).permutation(len(others))
    for chosen in order[: max(0, room)]:
        number, index = others[chosen]
        kept[number][index] = True
    return [
        replace(batch, selected=batch.selected[own])
        for batch, own in zip(batches, kept, strict=True)
    ]


def _is_last(batch: Batch) -> NDArray[np.bool_]:
    """Which selected positions are the last real ones of their rows."""
    row, column = batch.selected.T
    return np.asarray(column == last_positions(batch)[row], np.bool_)


def last_positions(batch: Batch) -> NDArray[np.int64]:
    """The column of the last real token of each row."""
    length = batch.attention_mask.shape[1]
    return np.asarray(length - 1 - np.argmax(batch.attention_mask[:, ::-1], axis=1), np.int64)


def digest(batches: Sequence[Batch]) -> str:
    """SHA-256 over names, shapes and contents: the name under which a run can be repeated."""
    hasher = hashlib.sha256()
    for batch in batches:
        arrays = {**batch.inputs(), "selected": batch.selected}
        shapes = {name: array.shape for name, array in arrays.items()}
        facts = (batch.name, batch.stimulus_set, batch.rows, batch.split, shapes)
        hasher.update(repr(facts).encode())
        for array in arrays.values():
            hasher.update(np.ascontiguousarray(array).tobytes())
    return hasher.hexdigest()
