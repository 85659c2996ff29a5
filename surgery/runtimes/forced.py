"""Teacher forcing over any runtime: what a model gives to tokens that are said to follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from surgery.metrics.divergence import log_probabilities
from surgery.runtimes.generate import GROUP, left_padded
from surgery.runtimes.interface import Runtime


@dataclass(frozen=True)
class Continuation:
    """Token ids of a text, and of what follows it; neither is empty."""

    prompt: tuple[int, ...]
    following: tuple[int, ...]


def force(
    runtime: Runtime, continuations: Sequence[Continuation], group: int = GROUP
) -> list[tuple[float, ...]]:
    """The log-probability in nats of each following token, given all before it; for each
    continuation in order. `group` of them run together, left-padded to one length.

    Raises `ValueError` where a prompt or what follows it is empty.
    """
    if not all(own.prompt and own.following for own in continuations):
        raise ValueError("a prompt and what follows it must hold at least one token each")
    found: dict[int, tuple[float, ...]] = {}

    def run(begin: int) -> None:
        some = continuations[begin : begin + group]
        found.update(zip(range(begin, begin + len(some)), _forced(runtime, some), strict=True))

    runtime.together([partial(run, begin) for begin in range(0, len(continuations), group)])
    return [found[number] for number in range(len(continuations))]


def _forced(runtime: Runtime, some: Sequence[Continuation]) -> list[tuple[float, ...]]:
    # The last token is asked for and not given: nothing is asked after it.
    logits = runtime.infer(left_padded([[*own.prompt, *own.following[:-1]] for own in some]))
    rows = zip(logits["logits"], some, strict=True)
    return [_row(row[-len(own.following) :], own.following) for row, own in rows]


def _row(logits: NDArray[np.float32], following: tuple[int, ...]) -> tuple[float, ...]:
    """Of `logits` [n, vocab] those of the n tokens `following`."""
    logs = log_probabilities(logits)
    return tuple(logs[np.arange(len(following)), following].tolist())
