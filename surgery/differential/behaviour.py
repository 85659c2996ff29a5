"""How the corners' next-token distributions and greedy responses differ, pair by pair.

A few numbers are kept of every position, so percentiles are exact and no logits are: a batch is
worked through in slices whose log-probabilities fit in `SLICE_BYTES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.evidence import EDITS, PAIRS, Divergence, Drift
from surgery.metrics.divergence import kl_of_logs, log_probabilities, nll_of_logs
from surgery.metrics.flips import position_noise, split_flips
from surgery.metrics.summary import delta_table, kl_table, perplexity_table
from surgery.stimuli import Batch

Kept = Mapping[str, NDArray[Any]]

SLICE_BYTES = 64 << 20


@dataclass
class Tokens:
    """A number of each token, -log p of the text's own next ones or a divergence, at one corner,
    and the text of each."""

    values: list[NDArray[np.float64]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def all(self) -> NDArray[np.float64]:
        return np.concatenate(self.values) if self.values else np.empty(0)


@dataclass
class Positions:
    """What is kept of every position of one pair, and the text of each."""

    kl: list[NDArray[np.float64]] = field(default_factory=list)
    flipped: list[NDArray[np.bool_]] = field(default_factory=list)
    near: list[NDArray[np.bool_]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.texts)

    @property
    def divergence(self) -> float:
        """The sum of KL over positions."""
        return float(np.concatenate(self.kl).sum())

    @property
    def flips(self) -> int:
        return int(np.concatenate(self.flipped).sum())


@dataclass
class BehaviourSums:
    """`pairs` by (stimulus set, pair), `tokens` by (stimulus set, corner) and `noise`, the float32
    noise of each position, by (stimulus set, `T_o` or `T_e`); `dtypes` of the corners' logits."""

    pairs: dict[tuple[str, str], Positions] = field(default_factory=dict)
    tokens: dict[tuple[str, str], Tokens] = field(default_factory=dict)
    noise: dict[tuple[str, str], list[NDArray[np.float64]]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)

    def add(self, batch: Batch, kept: Kept, references: Kept, dtypes: Mapping[str, str]) -> None:
        """Logits [n, vocab] of the corners, in float64 of the references, at `batch.selected`;
        `dtypes` are those the corners' logits were computed in."""
        self.dtypes.update(dtypes)
        widest = max((array.shape[-1] for array in kept.values()), default=1)
        step = max(1, SLICE_BYTES // (8 * len(PAIRS) * widest))
        for begin in range(0, len(batch.selected), step):
            some = _slice(batch, slice(begin, begin + step), kept, references)
            self._add_tokens(some)
            self._add_noises(some)
            for pair, (p, q) in PAIRS.items():
                if some.shape(p) == some.shape(q) != ():
                    self._add_pair(some, pair)

    def _add_tokens(self, some: _Slice) -> None:
        batch, selected = some.batch, some.selected
        rows, columns = followed(batch, selected)
        following = batch.input_ids[selected[rows, 0], columns + 1]
        for name, logs in some.logs.items():
            if logs.shape[-1] > int(batch.input_ids.max()):
                own = self.tokens.setdefault((batch.stimulus_set, name), Tokens())
                own.values.append(nll_of_logs(logs[rows], following))
                own.texts += [batch.rows[row] for row in selected[rows, 0]]

    def _add_noises(self, some: _Slice) -> None:
        for name, noise in some.noises.items():
            self.noise.setdefault((some.batch.stimulus_set, name), []).append(noise)

    def _add_pair(self, some: _Slice, pair: str) -> None:
        p, q = PAIRS[pair]
        own = self.pairs.setdefault((some.batch.stimulus_set, pair), Positions())
        noises = (some.noise(p), some.noise(q))
        dtypes = (self.dtypes[p], self.dtypes[q])
        flipped, near = split_flips(some.kept[p], some.kept[q], dtypes, noises)
        own.kl.append(kl_of_logs(some.logs[p], some.logs[q]))
        own.flipped.append(flipped)
        own.near.append(near)
        own.texts += [some.batch.rows[row] for row in some.selected[:, 0]]

    def over_sets(self, pair: str) -> tuple[float | None, int | None]:
        """Mean KL and number of flips of a pair over all sets; None where nothing was kept."""
        own = [found for (_, name), found in self.pairs.items() if name == pair]
        count = sum(found.count for found in own)
        if not count:
            return None, None
        return sum(found.divergence for found in own) / count, sum(found.flips for found in own)

    def rows(self) -> Iterator[Divergence]:
        """One row for each pair on each stimulus set."""
        for (stimulus_set, pair), own in self.pairs.items():
            before, after = self.token_pair(stimulus_set, pair)
            yield Divergence(
                stimulus_set=stimulus_set,
                pair=pair,
                positions=own.count,
                kl=kl_table(np.concatenate(own.kl)),
                flips=own.flips,
                near_ties=int(np.concatenate(own.near).sum()),
                tokens=len(before),
                perplexity=perplexity_table(before, after) if len(before) else {},
                delta_p=delta_table(before, after) if len(before) else {},
            )

    def texts(self, stimulus_set: str, pair: str) -> list[str]:
        """The text of each token of `token_pair`."""
        return self.tokens[stimulus_set, PAIRS[pair][0]].texts

    def token_pair(self, stimulus_set: str, pair: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """-log p of the same tokens at both corners of a pair; none where one of them has none."""
        one, other = (self.tokens.get((stimulus_set, name), Tokens()) for name in PAIRS[pair])
        if one.texts != other.texts:
            return np.empty(0), np.empty(0)
        return one.all(), other.all()


@dataclass(frozen=True)
class _Slice:
    """Some positions of a batch, `selected` [n, 2]: logits and log-probabilities [n, vocab] of the
    corners, and the float32 noise [n] of the models that have a reference."""

    batch: Batch
    selected: NDArray[np.int64]
    kept: Kept
    logs: Kept
    noises: Kept

    def shape(self, corner: str) -> tuple[int, ...]:
        return self.kept[corner].shape if corner in self.kept else ()

    def noise(self, corner: str) -> NDArray[np.float64]:
        """The noise of the corner's model in PyTorch; zero where it has no reference."""
        return self.noises.get(f"T_{corner[-1]}", np.zeros(len(self.selected)))


def _slice(batch: Batch, own: slice, kept: Kept, references: Kept) -> _Slice:
    some = {name: array[own] for name, array in kept.items()}
    noises = {
        name: position_noise(some[name], exact[own])
        for name, exact in references.items()
        if name in some and kept[name].shape == exact.shape
    }
    logs = {name: log_probabilities(logits) for name, logits in some.items()}
    return _Slice(batch, batch.selected[own], some, logs, noises)


def followed(
    batch: Batch, selected: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of the positions `selected` [n, 2] have a real next token, and their columns."""
    length = batch.input_ids.shape[1]
    row, column = selected.T
    real = batch.attention_mask[row, np.minimum(column + 1, length - 1)] == 1
    index = np.flatnonzero((column + 1 < length) & real)
    return index, column[index]


def drifts(sums: BehaviourSums) -> Iterator[Drift]:
    """How far the edit moved each stimulus set, in each runtime."""
    for (stimulus_set, pair), own in sums.pairs.items():
        if pair in EDITS:
            share = own.flips / own.count
            yield Drift(stimulus_set, pair, own.count, own.divergence / own.count, share)
