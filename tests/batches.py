"""Batches of token ids in the shapes that show a baked-in size or an ignored mask."""

from __future__ import annotations

import numpy as np

from surgery.stimuli.interface import Batch

SHAPES = (
    ("unpadded", 3, 9, 0, 0),
    ("one token", 1, 1, 0, 0),
    ("left", 2, 11, 4, 0),
    ("right", 4, 6, 0, 3),
    ("long", 1, 40, 0, 0),
)
"""(name, rows, length, padding left of row 0, padding right of row 0)"""


def batch(name: str, rows: int, length: int, left: int, right: int) -> Batch:
    generator = np.random.default_rng(len(name))
    ids = generator.integers(3, 100, (rows, length))
    mask = np.ones_like(ids)
    mask[0, :left] = 0
    mask[0, length - right :] = 0
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    names = tuple(f"{name}-{row}" for row in range(rows))
    return Batch(name, "probe", ids, mask, positions, np.argwhere(mask == 1), names)


BATCHES = tuple(batch(*shape) for shape in SHAPES)
