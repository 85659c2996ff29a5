"""Where a prediction turns: what a lens reads before and after each layer, at the last position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.find.interface import Lab
from surgery.find.prompts.rows import Row, inputs_of, pieces
from surgery.find.prompts.watched import Watched
from surgery.find.scores.lens import Lens
from surgery.find.scores.stream import Stream

Floats = NDArray[np.float64]
Removed = Callable[[int], AbstractContextManager[None]]
"""While entered, the MLP of a layer adds nothing to the stream."""


@dataclass(frozen=True)
class Read:
    """What the lens reads of n prompts in the states before each layer and after the last
    [n, layers + 1].

    margin: as `Watched` has it; answer, rank: log p of the goal's answer and how many tokens are
    above it; top, top_rank: the same of the model's final choice; kl: KL(final ‖ read) in nats;
    first: whether the final choice is first. mid [n, layers]: the margin between a layer's
    attention and its MLP; empty where it is not asked for.
    """

    margin: Floats
    answer: Floats
    rank: Floats
    top: Floats
    top_rank: Floats
    kl: Floats
    first: Floats
    mid: Floats

    def turns(self) -> NDArray[np.int64]:
        """The first state [n] from which on the final choice is first: l + 1 if layer l turned
        the prediction, 0 if it needed none."""
        held = np.cumprod(self.first[:, ::-1], axis=1).sum(axis=1)
        return np.asarray(self.first.shape[1] - held, np.int64)


def read(
    lab: Lab, stream: Stream, watched: Watched, lens: Lens | None, removed: Removed | None
) -> Read:
    """What the lens reads of the watched prompts; with `removed` the states between attention and
    MLP too, which is what a block gives without its MLP. Without a lens: the logit lens."""
    found = []
    for part in pieces(len(watched.rows), lab.budget):
        lab.progress("reading by the lens", part.start, len(watched.rows))

        def compute(part: slice = part) -> Mapping[str, NDArray[Any]]:
            inputs = inputs_of(lab.runtime, watched.rows[part])
            states = [state[:, -1:] for state in stream.states(inputs)]
            table = _table(stream, watched, lens, states, part, lab.goal.sign)
            mid = _between(lab, stream, watched, removed, part) if removed else []
            return {**table, "mid": np.array(mid).T.reshape(len(states[0]), -1)}

        found.append(lab.journal.arrays(f"read, prompts {part.start} to {part.stop}", compute))
    return Read(**{name: np.concatenate([own[name] for own in found]) for name in found[0]})


def _table(
    stream: Stream, watched: Watched, lens: Lens | None, states: Any, part: slice, sign: int
) -> dict[str, Floats]:
    """The numbers of `Read` but for `mid`, each [n, layers + 1]."""
    import torch

    with torch.no_grad():
        logits = [
            stream.logits(lens.translated(layer, state) if lens else state)[:, -1].double()
            for layer, state in enumerate(states)
        ]
        final = logits[-1].log_softmax(-1)
        columns = [_column(watched, own, final, part, sign) for own in logits]
    return {name: np.stack([own[name] for own in columns], axis=1) for name in columns[0]}


def _column(watched: Watched, logits: Any, final: Any, part: slice, sign: int) -> dict[str, Floats]:
    """The numbers of one state [n], of logits and final log-probabilities [n, vocab]."""
    logs = logits.log_softmax(-1)
    choice = [(int(token),) for token in final.argmax(-1)]
    answer, rank = _standing(logs, watched.answers(part, sign))
    top, top_rank = _standing(logs, choice)
    return {
        "margin": watched.margins(logits, part).numpy(),
        "answer": answer,
        "rank": rank,
        "top": top,
        "top_rank": top_rank,
        "kl": (final.exp() * (final - logs)).sum(-1).numpy(),
        "first": (logs.argmax(-1) == final.argmax(-1)).double().numpy(),
    }


def _standing(logs: Any, tokens: Sequence[Row]) -> tuple[Floats, Floats]:
    """log p [n] of any of each row's tokens, and how many tokens are above the best of them."""
    own = [row[list(wanted)] for row, wanted in zip(logs, tokens, strict=True)]
    log = [float(part.logsumexp(-1)) for part in own]
    rank = [int((row > part.max()).sum()) for row, part in zip(logs, own, strict=True)]
    return np.array(log), np.array(rank, np.float64)


def _between(
    lab: Lab, stream: Stream, watched: Watched, removed: Removed, part: slice
) -> list[Floats]:
    """The margin [n] between attention and MLP of each layer, by the logit lens."""
    import torch

    inputs, found = inputs_of(lab.runtime, watched.rows[part]), []
    for layer in range(lab.arch.layers):
        with removed(layer):
            state = stream.states(inputs)[layer + 1][:, -1:]
        with torch.no_grad():
            logits = stream.logits(state)[:, -1]
        found.append(watched.margins(logits, part).numpy())
    return found
