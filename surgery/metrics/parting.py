"""Where two greedy responses to one prompt part."""

from __future__ import annotations

from collections.abc import Sequence


def parting(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first position, from 0, at which tokens `a` and `b` differ or only one goes on; None
    where they are the same."""
    for position, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return position
    return None if len(a) == len(b) else min(len(a), len(b))
