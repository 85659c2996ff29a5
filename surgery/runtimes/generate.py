"""Greedy decoding over any runtime: the full prefix each step, no cache to get wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from surgery.runtimes.interface import Runtime

GROUP = 8
"""Prompts that run together, left-padded to one length, unless a caller says otherwise."""


@dataclass(frozen=True)
class Generation:
    """Prompts of token ids, none empty, to continue until a token of `eos` or the maximum."""

    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    eos: tuple[int, ...]


class RunnerUp(NamedTuple):
    """The second choice at one step: its token, how far its logit is behind the first, and the
    larger size of both logits."""

    token: int
    gap: float
    size: float


@dataclass(frozen=True)
class Generated:
    """The new tokens of each prompt, an end token included, and the runner-up of each token.

    `nonfinite` counts prompts that stopped early because a logit was NaN or infinite.
    """

    tokens: tuple[tuple[int, ...], ...]
    nonfinite: int
    runners: tuple[tuple[RunnerUp, ...], ...]


def generate(
    runtime: Runtime, requests: Sequence[Generation], group: int = GROUP
) -> list[Generated]:
    """Argmax of the last position's logits, the first index on ties; for each request in order.

    `group` prompts run together; how many changes a logit by rounding alone.
    """
    if not all(prompt for request in requests for prompt in request.prompts):
        raise ValueError("a prompt to continue must hold at least one token")
    found: dict[tuple[int, int], Generated] = {}

    def run(place: tuple[int, int], prompts: tuple[tuple[int, ...], ...]) -> None:
        found[place] = _generate_group(runtime, prompts, requests[place[0]])

    places = {
        (number, index): prompts
        for number, request in enumerate(requests)
        for index, prompts in enumerate(_groups(request.prompts, group))
    }
    runtime.together([partial(run, place, prompts) for place, prompts in places.items()])
    return [
        _joined([found[place] for place in places if place[0] == number])
        for number in range(len(requests))
    ]


def _joined(groups: list[Generated]) -> Generated:
    return Generated(
        tuple(row for group in groups for row in group.tokens),
        sum(group.nonfinite for group in groups),
        tuple(row for group in groups for row in group.runners),
    )


def _groups(
    prompts: tuple[tuple[int, ...], ...], size: int
) -> Iterator[tuple[tuple[int, ...], ...]]:
    for begin in range(0, len(prompts), size):
        yield prompts[begin : begin + size]


def _generate_group(
    runtime: Runtime, prompts: tuple[tuple[int, ...], ...], request: Generation
) -> Generated:
    texts = [list(prompt) for prompt in prompts]
    runners: list[list[RunnerUp]] = [[] for _ in texts]
    active, nonfinite = list(range(len(texts))), 0
    for _ in range(request.max_new_tokens):
        logits = runtime.infer(left_padded([texts[row] for row in active]))["logits"][:, -1, :]
        going = []
        for row, scores in zip(active, logits, strict=True):
            if not np.isfinite(scores).all():
                nonfinite += 1
                continue
            token = int(np.argmax(scores))
            texts[row].append(token)
            runners[row].append(runner_up(scores, token))
            if token not in request.eos:
                going.append(row)
        active = going
        if not active:
            break
    new = (text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True))
    return Generated(tuple(map(tuple, new)), nonfinite, tuple(map(tuple, runners)))


def runner_up(scores: NDArray[Any], first: int) -> RunnerUp:
    """Which of the logits `scores` [vocab] comes next after token `first`."""
    second = int(np.argmax(np.where(np.arange(len(scores)) == first, -np.inf, scores)))
    a, b = float(scores[first]), float(scores[second])
    return RunnerUp(second, a - b, max(abs(a), abs(b)))


def left_padded(rows: list[list[int]]) -> dict[str, NDArray[np.int64]]:
    """`input_ids` (0 where padded), `attention_mask` and `position_ids`, int64 [rows, longest]."""
    length = max(map(len, rows))
    ids = np.zeros((len(rows), length), np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = row
        mask[number, length - len(row) :] = 1
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
