"""How far two ways to score the same candidates agree."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def rank_correlation(
    one: Sequence[float] | NDArray[np.float64], other: Sequence[float] | NDArray[np.float64]
) -> float:
    """Spearman's: the correlation of the ranks, ties having the mean of theirs; NaN where all of
    one side tie, or fewer than two candidates are given."""
    from scipy.stats import rankdata

    ranks = [rankdata(scores) - (len(scores) + 1) / 2 for scores in (one, other)]
    size = math.sqrt(float(ranks[0] @ ranks[0]) * float(ranks[1] @ ranks[1]))
    return float(ranks[0] @ ranks[1]) / size if size else math.nan
