"""`heads`: which attention heads decide between two answers (PH3, arXiv 2402.18154).

A head's score is the change of logit(raised) - logit(rival) at the last position, averaged over
the prompts, when the head's output becomes what it is on a corrupted prompt: `path` exactly, with
all other heads kept and MLPs and norms following; `direct` with MLPs kept too; `gradient` to first
order. The answer that the goal raises is the raised one; of a goal to be lowered, it is the rival.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Head
from surgery.errors import FindError, quote
from surgery.find.interface import Finder, Lab, Proposal, Ranking
from surgery.find.prompts.contrasts import Names, Pair, Pairs, answer_names, contrast_pairs
from surgery.find.prompts.rows import Row, inputs_of, pieces
from surgery.find.scores.agreement import rank_correlation
from surgery.find.scores.head_effects import (
    Contrast,
    Effects,
    direct_effects,
    gradient_effects,
    path_effects,
)
from surgery.find.scores.patching import Patching, Recorded
from surgery.find.tables import by_score

POSITIONS = ("last", "all")
Scores = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Heads(Finder):
    """`positions`: where `path` exchanges a head's output. `against`: the name of the answers
    opposed to the goal's, where the prompts have more than one other."""

    kind: ClassVar[str] = "heads"
    methods: ClassVar[tuple[str, ...]] = ("path", "direct", "gradient")
    sizes: ClassVar[tuple[int, ...]] = (1, 3, 5, 7, 9, 15)

    method: str = "path"
    positions: str = "last"
    against: str | None = None

    def rank(self, lab: Lab) -> Ranking:
        self._check(lab)
        stimuli = lab.of_set("target")
        names = answer_names(stimuli, lab.goal, self.against)
        sizes = lab.arch.sizes
        found = contrast_pairs(
            stimuli, names, lab.tokenizer, sizes["vocab"], sizes["positions"], lab.seed
        )
        effects = self._effects(lab, found.pairs)
        own = effects[self.method]
        layers, heads = np.indices(own.shape[:2]).reshape(2, -1)
        raised, rival = own.reshape(-1, 2).T
        named = {"score": raised - rival, "raised": raised, "rival": rival}
        columns = {"layer": layers, "head": heads, **named}
        return by_score(columns, self._facts(names, found, effects))

    def propose(self, lab: Lab, ranking: Ranking, chosen: Sequence[int]) -> Proposal:
        layers, heads = ranking.column("layer"), ranking.column("head")
        named = [str(Head(int(layers[index]), int(heads[index]))) for index in chosen]
        return Proposal(({"op": "heads", "heads": named, "factor": 0.0},))

    def _check(self, lab: Lab) -> None:
        if lab.arch.facts.kind != "decoder":
            raise FindError(
                f"heads: expected a decoder, which gives next tokens; found {lab.arch.family}"
            )
        if self.method not in self.methods or self.positions not in POSITIONS:
            raise FindError(
                f"heads: expected a method of {', '.join(self.methods)} and positions of "
                f"{', '.join(POSITIONS)}; found {quote(self.method)} and {quote(self.positions)}"
            )
        if self.positions == "all" and self.method != "path":
            raise FindError(
                f"heads: method {self.method} reads the last position; expected method path with "
                f"positions all"
            )

    def _effects(self, lab: Lab, pairs: Sequence[Pair]) -> dict[str, Scores]:
        """Mean effects on the raised answer and its rival, [layers, heads, 2], by this method and
        by the two that cost little."""
        patching = Patching(lab.live, lab.arch)
        methods = sorted({self.method, "direct", "gradient"})
        found: dict[str, list[Effects]] = {method: [] for method in methods}
        groups = self._groups(lab, patching, pairs)
        for number, (name, own) in enumerate(groups):
            chunk = _Chunk(lab, patching, own, self.positions == "all", name)
            for method in methods:
                lab.progress(f"heads: {method}", number, len(groups))
                found[method].append(chunk.effects(method))
        lab.progress("heads", len(groups), len(groups))
        return {method: _mean(method, own) for method, own in found.items()}

    def _groups(
        self, lab: Lab, patching: Patching, pairs: Sequence[Pair]
    ) -> list[tuple[str, tuple[Pair, ...]]]:
        """Prompts of like length, each group with a name: at the last position as many as run at
        once, at all of them as many as do with every head."""
        ordered = sorted(pairs, key=lambda pair: len(pair.clean))
        longest = len(ordered[-1].clean)
        size = lab.budget if self.positions == "last" else lab.budget // (patching.heads * longest)
        size = max(1, size)
        return [
            (f"{self.positions} {part.start} to {part.stop}", tuple(ordered[part]))
            for part in pieces(len(ordered), size)
        ]

    def _facts(self, names: Names, found: Pairs, effects: dict[str, Scores]) -> dict[str, Any]:
        scores = {method: (own[..., 0] - own[..., 1]).ravel() for method, own in effects.items()}
        others = [method for method in effects if method != self.method]
        agreement = {m: rank_correlation(scores[self.method], scores[m]) for m in others}
        return {
            "raised": names.raised,
            "rival": names.rival,
            "positions": self.positions,
            "prompts": len(found.pairs),
            "left_out": dict(found.left_out),
            "corrupted": {"given": len(found.pairs) - found.drawn, "drawn": found.drawn},
            "rank_correlation": {
                method: "undefined" if math.isnan(value) else value
                for method, value in agreement.items()
            },
        }


@dataclass(frozen=True)
class _Chunk:
    """Prompts that are run together; what they need is recorded when a piece is first missing."""

    lab: Lab
    patching: Patching
    pairs: tuple[Pair, ...]
    whole: bool
    name: str

    def effects(self, method: str) -> Effects:
        """[layers, prompts, heads, 2], from the journal as far as it has them."""
        if method == "gradient":
            return self._piece(
                "gradient",
                lambda: gradient_effects(self.patching, self._contrast, self.lab.budget),
            )
        of_layer = path_effects if method == "path" else direct_effects

        def layer_effects(layer: int) -> Effects:
            return of_layer(self.patching, self._contrast, layer, self.lab.budget)

        layers = range(self.patching.layers)
        return np.stack([self._piece(f"{method} L{n}", partial(layer_effects, n)) for n in layers])

    def _piece(self, name: str, compute: Callable[[], Effects]) -> Effects:
        return self.lab.journal.array(f"heads {name} {self.name}", compute)

    @cached_property
    def _contrast(self) -> Contrast:
        import torch

        tokens = torch.tensor([pair.tokens for pair in self.pairs])
        clean = self._record([pair.clean for pair in self.pairs])
        return Contrast(clean, self._record([pair.corrupted for pair in self.pairs]), tokens)

    def _record(self, rows: Sequence[Row]) -> Recorded:
        return self.patching.record(inputs_of(self.lab.runtime, rows), self.whole, self.lab.budget)


def _mean(method: str, parts: Sequence[Effects]) -> Scores:
    """Effects of all prompts [layers, prompts, heads, 2] as their mean, [layers, heads, 2]."""
    found: Scores = np.concatenate(parts, axis=1).mean(axis=1, dtype=np.float64)
    if not np.isfinite(found).all():
        raise FindError(
            f"heads: the {method} effects on these prompts are not finite; expected a model whose "
            f"logits are"
        )
    return found
