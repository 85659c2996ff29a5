"""What `heads` and `neurons` share: scaling the inputs of a projection by a factor."""

from __future__ import annotations

import numpy as np

from surgery.edits.interface import Array


def scale(slab: Array, factor: float) -> Array:
    """`slab` times `factor`; a factor of 0 gives +0.0 everywhere, NaN and -1 included."""
    return np.zeros_like(slab) if factor == 0 else slab * slab.dtype.type(factor)
