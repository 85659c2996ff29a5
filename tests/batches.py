"""Batches of token ids in the shapes that show a baked-in size or an ignored mask."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from surgery.stimuli.interface import Batch

SHAPES = (
    ("unpadded", 3, 9, 0, 0),
    ("one token", 1, 1, 0, 0),
    ("left", 2, 11, 4, 0),
    ("right", 4, 6, 0, 3),
    ("long", 1, 40, 0, 0),
)
"""(name, rows, length, padding left of row 0, padding right of row 0)"""


MASKS = {
    "holes": [[1] * 9, [1, 1, 0, 1, 0, 0, 1, 0, 1], [0, 1, 0, 1, 1, 1, 0, 1, 0]],
    "masked row": [[1] * 5, [0] * 5, [0, 0, 1, 1, 1]],
}
"""Padding between real tokens, and a row of nothing else beside others."""


def batch(name: str, rows: int, length: int, left: int, right: int) -> Batch:
    mask = np.ones((rows, length), np.int64)
    mask[0, :left] = 0
    mask[0, length - right :] = 0
    return masked(name, mask)


def masked(name: str, mask: NDArray[np.int64]) -> Batch:
    rows = len(mask)
    ids = np.random.default_rng(len(name)).integers(3, 100, mask.shape)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    names = tuple(f"{name}-{row}" for row in range(rows))
    return Batch(name, "probe", ids, mask, positions, np.argwhere(mask == 1), names)


BATCHES = (
    *(batch(*shape) for shape in SHAPES),
    *(masked(name, np.array(mask, np.int64)) for name, mask in MASKS.items()),
)
