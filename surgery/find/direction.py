"""`find direction`: one direction of the residual stream that tells two sets of prompts apart.

Every layer gives a candidate, the normalised difference of both sets' means (arXiv 2406.11717).
They are ranked by

- `separation`: how many standard deviations the two sets' prompts are apart along it; or
- `ablation`: what taking it out of everything that is written, as the recipe will, does to the
  logit difference between the goal's answer and another one on the training prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from surgery.arch import Architecture
from surgery.edits.direction import Direction as DirectionEdit
from surgery.edits.projection import refuse_inexact
from surgery.errors import EditError, FindError
from surgery.find.interface import SCORE, Finder, Lab, Proposal, Ranking
from surgery.find.prompts.questions import Question, questions_of
from surgery.find.prompts.rows import Row, inputs_of, pieces, prompts_of, refuse_encoder
from surgery.find.scores.margins import margins, pairs_of
from surgery.find.scores.mean_directions import Spread, Vectors, directions, separation, streams
from surgery.find.tables import by_score
from surgery.stimuli import SETS

POSITIONS = ("last", "mean")
KEY = "direction"
DIRECTIONS = "directions"


@dataclass(frozen=True, kw_only=True)
class Direction(Finder):
    """to_set, from_set: the sets to and from whose means the direction goes, `target`, `preserve`.
    position: the stream is taken at the `last` token of a prompt, or as the `mean` over all.
    orthogonalize: the direction loses its part along the mean of `from_set`. strength: how much of
    it the recipe takes out. approximate: also where norms rescale what is written.
    """

    kind: ClassVar[str] = "direction"
    methods: ClassVar[tuple[str, ...]] = ("separation", "ablation")
    sizes: ClassVar[tuple[int, ...]] = (1,)

    method: str = "separation"
    to_set: str = "target"
    from_set: str = "preserve"
    position: str = "last"
    orthogonalize: bool = False
    strength: float = 1.0
    approximate: bool = False

    def rank(self, lab: Lab) -> Ranking:
        """Columns: `layer`, `score`, the `separation` of the two sets and their mean projections,
        and, where the target prompts name the goal's answer, the `effect` of the ablation."""
        refuse_encoder(lab, "find direction")
        self._check(lab.arch)
        prompts = {name: prompts_of(lab, name) for name in (self.to_set, self.from_set)}
        if min(map(len, prompts.values())) < 2:
            raise FindError(f"find direction needs two prompts each of {', '.join(prompts)}")
        first, second = (self._mean(lab, name, rows) for name, rows in prompts.items())
        found = directions(first, second, self.orthogonalize)
        spreads = [self._spread(lab, name, rows, found) for name, rows in prompts.items()]
        apart = separation(*spreads)
        columns = {"separation": apart, "to_set": spreads[0].mean, "from_set": spreads[1].mean}
        effect = self._effects(lab, found)
        if effect is not None:
            columns["effect"] = effect
        score = apart if self.method == "separation" else lab.goal.sign * columns["effect"]
        facts = {"prompts": {name: len(own) for name, own in prompts.items()}}
        table = {"layer": np.arange(len(score)), SCORE: score, **columns}
        return by_score(table, facts, {DIRECTIONS: found})

    def propose(self, lab: Lab, ranking: Ranking, chosen: Sequence[int]) -> Proposal:
        [index] = chosen
        layer = int(ranking.column("layer")[index])
        return self._proposal(lab, ranking.arrays[DIRECTIONS][layer])

    def draw(
        self, lab: Lab, ranking: Ranking, chosen: Sequence[int], generator: np.random.Generator
    ) -> Proposal:
        """A random direction, every one of them as likely."""
        vector = generator.normal(size=lab.arch.width)
        return self._proposal(lab, vector / np.linalg.norm(vector))

    def _proposal(self, lab: Lab, vector: Vectors) -> Proposal:
        entry = {
            "op": "direction",
            "vector": {"file": lab.tensors, "key": KEY},
            "strength": self.strength,
            "matrices": "writers",
            "layers": "all",
            **({"approximate": True} if self.approximate else {}),
        }
        tensors = {KEY: vector.astype(np.float32)}
        return Proposal((entry,), tensors, untie=lab.arch.tied)

    def _edit(self, arch: Architecture, vector: Vectors) -> DirectionEdit:
        layers = tuple(range(arch.layers))
        return DirectionEdit(vector[:, None], self.strength, layers, True, None)

    def _check(self, arch: Architecture) -> None:
        if self.position not in POSITIONS:
            raise FindError(f"position is {self.position!r}; expected {' or '.join(POSITIONS)}")
        if self.to_set == self.from_set or not {self.to_set, self.from_set} <= set(SETS):
            raise FindError(
                f"to_set is {self.to_set!r} and from_set {self.from_set!r}; expected two of "
                f"{', '.join(SETS)}"
            )
        if not self.approximate:
            try:
                refuse_inexact("direction", arch, self._edit(arch, np.zeros(1)).writers(arch))
            except EditError as error:
                raise FindError(str(error)) from None

    def _mean(self, lab: Lab, name: str, rows: Sequence[Row]) -> Vectors:
        """The mean over prompts of the stream, [layers, width]."""

        def total(part: slice) -> Vectors:
            return np.asarray(self._streams(lab, rows[part]).sum(0))

        sums = list(_pieces(lab, f"stream of {name}", len(rows), total))
        return np.asarray(sum(sums) / len(rows))

    def _spread(self, lab: Lab, name: str, rows: Sequence[Row], found: Vectors) -> Spread:
        """Where the prompts lie along each layer's direction."""

        def along(part: slice) -> Vectors:
            return np.asarray((self._streams(lab, rows[part]) * found).sum(-1))

        every = np.concatenate(list(_pieces(lab, f"spread of {name}", len(rows), along)))
        return Spread(every.mean(0), every.var(0, ddof=1))

    def _streams(self, lab: Lab, rows: Sequence[Row]) -> Vectors:
        return streams(lab.live, lab.arch, inputs_of(lab.runtime, rows), self.position)

    def _effects(self, lab: Lab, found: Vectors) -> Vectors | None:
        """The mean change of the logit difference by each ablation [layers]; None where no answers
        are named and nobody asked for it."""
        try:
            questions = questions_of(lab, "target")
        except FindError:
            if self.method == "ablation":
                raise
            return None
        return np.array([self._effect(lab, questions, n, r) for n, r in enumerate(found)])

    def _effect(
        self, lab: Lab, questions: Sequence[Question], layer: int, vector: Vectors
    ) -> float:
        edit = self._edit(lab.arch, vector)

        def moved(part: slice) -> Vectors:
            return _moved(lab, edit, questions[part])

        every = list(_pieces(lab, f"ablation of layer {layer}", len(questions), moved))
        return float(np.concatenate(every).mean())


def _pieces(lab: Lab, name: str, count: int, of: Callable[[slice], Vectors]) -> Iterator[Vectors]:
    """What `of` gives for each batch of `count` prompts, kept in the journal."""
    for part in pieces(count, lab.budget):
        yield lab.journal.array(f"{name}: {part.start} to {part.stop}", partial(of, part))
        lab.progress(name, part.stop, count)


def _moved(lab: Lab, edit: DirectionEdit, questions: Sequence[Question]) -> Vectors:
    """By how much an edit moves each logit difference [batch]."""
    import torch

    inputs = inputs_of(lab.runtime, [question.ids for question in questions])
    pairs = pairs_of(lab.live, inputs, questions)
    with torch.no_grad():
        before = margins(lab.live, inputs, pairs)
        with edit.hook(lab.live, lab.arch, None):
            after = margins(lab.live, inputs, pairs)
    moved: Vectors = (after - before).double().numpy()
    return moved
