"""Faults to plant in a portable export of ours, each with where it truly is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.localize.seeds import cache, constants, graph, interface, weights
from tests.localize.seeds.target import Target, Truth, Unfit

__all__ = ["SEEDS", "Target", "Truth", "Unfit", "names"]

SEEDS: dict[str, dict[str, Callable[[Target], Truth]]] = {
    "weight": weights.SEEDS,
    "constant": constants.SEEDS,
    "graph": graph.SEEDS,
    "interface": interface.SEEDS,
    "cache": cache.SEEDS,
}
"""By class, then by what is wrong."""


def names() -> Iterator[tuple[str, str]]:
    """Class and name of every seed."""
    for kind, seeds in SEEDS.items():
        yield from ((kind, name) for name in seeds)
