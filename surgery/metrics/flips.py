"""Top-1 flips split in two: near-ties, which rounding alone can turn, and real ones.

Two runs choose tokens a and b at one position. Each puts its own choice ahead by a gap. The gap is
within rounding where it is at most

    grid + 8 · noise

grid: the distance between neighbouring numbers of the dtype the run's logits are in, at the larger
of the two. Each logit is rounded by at most half of it, so rounding the output moves a gap by one.
noise: the root mean square, over the vocabulary, of PyTorch's float32 logits minus float64 ones at
this very position: what the computation before that rounding does. 8 is how much of that noise a
conversion may have before it is called wrong (`conversion.max_noise_ratio`). An ONNX run is given
the noise of its model in PyTorch and not its own error, which would excuse a wrong conversion.

A flip is a near-tie where the gaps of *both* runs are within rounding: a tie that one run breaks
clearly is a difference. What cannot be compared (NaN) is real.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Flags = NDArray[np.bool_]

NOISE_UNITS = 8.0
GRIDS = ("float16", "float32", "float64")


def position_noise(found: Floats, reference: Floats) -> NDArray[np.float64]:
    """Root mean square of `found` − `reference` [n, vocab] at each of n positions."""
    difference = np.asarray(found, np.float64) - reference
    return np.asarray(np.sqrt(np.square(difference).mean(axis=-1)), np.float64)


def reach(largest: Floats, dtype: str, noise: Floats | float) -> NDArray[np.float64]:
    """The gap that rounding can turn at logits of size `largest` [n]; `noise` [n] or one number.

    A dtype without a grid of its own here has float32's, which is finer: fewer near-ties.
    """
    own = np.dtype(dtype if dtype in GRIDS else "float32")
    grid = np.spacing(np.abs(largest).astype(own)).astype(np.float64)
    return np.asarray(grid + NOISE_UNITS * np.asarray(noise, np.float64), np.float64)


def gaps(logits: Floats, first: NDArray[np.int64], second: NDArray[np.int64]) -> tuple[Any, Any]:
    """By how much token `first` is ahead of `second`, [n], and the larger size of both logits."""
    index = np.arange(len(logits))
    a, b = (logits[index, token].astype(np.float64) for token in (first, second))
    return a - b, np.maximum(np.abs(a), np.abs(b))


def split_flips(
    p: Floats,
    q: Floats,
    dtypes: tuple[str, str],
    noises: tuple[Floats | float, Floats | float],
) -> tuple[Flags, Flags]:
    """Which of n positions of `p` and `q` [n, vocab] flip, and which flips are near-ties, [n] each.

    `dtypes` and `noises` (see `position_noise`) are those of the two runs. The most likely token
    is the first one on ties.
    """
    a, b = p.argmax(axis=-1), q.argmax(axis=-1)
    near = flipped = a != b
    for logits, own, other, dtype, noise in (
        (p, a, b, dtypes[0], noises[0]),
        (q, b, a, dtypes[1], noises[1]),
    ):
        gap, largest = gaps(logits, own, other)
        near = near & (gap <= reach(largest, dtype, noise))
    return flipped, near
