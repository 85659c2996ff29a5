"""Tables of candidates as rankings have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.find.interface import SCORE, Array, Ranking


def by_score(
    columns: Mapping[str, NDArray[Any]],
    facts: Mapping[str, object],
    arrays: Mapping[str, Array] | None = None,
) -> Ranking:
    """A ranking of the candidates of `columns` [n], by falling score, the first of equal ones
    first."""
    order = np.argsort(-columns[SCORE], kind="stable")
    # Addresses stay integers, which is how a recipe reads them from a file of scores.
    rows = zip(*(column[order].tolist() for column in columns.values()), strict=True)
    return Ranking(tuple(columns), tuple(rows), arrays or {}, facts)
