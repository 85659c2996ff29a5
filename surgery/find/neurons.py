"""`find neurons`: the MLP neurons of a wanted or unwanted habit, above all of language confusion.

Comparative neuron selection (arXiv 2505.16538): the model answers, each response in a wrong
language is cut at its confusion point, and every neuron is scored there by what it adds to the
log-probability of the token the model chooses. With a sibling that was tuned to do without the
habit, those come first whose score falls most from the model to it, at the same prompts.

Of AurA (Whispering Experts, ICML 2024) `auroc` takes the scores alone: how well a neuron tells the
target prompts from the preserved ones, before the activation. The edit is the same for all methods,
the neuron set to zero where the down projection reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Neuron
from surgery.arch import Architecture, identify
from surgery.checkpoint import Checkpoint
from surgery.errors import FindError
from surgery.find.interface import SCORE, Finder, Lab, Proposal, Ranking
from surgery.find.prompts.points import confusion_points
from surgery.find.prompts.rows import token_rows
from surgery.find.scores.neuron_totals import (
    Subject,
    Totals,
    ablation_totals,
    areas,
    attribution_totals,
    gradient_totals,
    highest,
)
from surgery.runtimes.pytorch import TorchRuntime

SHARE = 0.02
"""Of all neurons, the most that are ever proposed: an edit of more is no edit of few neurons."""
ABLATED = 512
"""How many neurons are ablated, those of highest gradient score: each is a run of the model."""


@dataclass(frozen=True, kw_only=True)
class Neurons(Finder):
    """tuned: the folder of a sibling checkpoint without the habit; new_tokens: how long responses
    may be; languages: what the detector chooses among, by default those of the answers."""

    kind: ClassVar[str] = "neurons"
    methods: ClassVar[tuple[str, ...]] = ("attribution", "ablation", "gradient", "auroc")
    sizes: ClassVar[tuple[int, ...]] = (4, 8, 16, 32, 64, 128)

    method: str = "attribution"
    tuned: Path | None = None
    new_tokens: int = 100
    languages: tuple[str, ...] = ()

    def rank(self, lab: Lab) -> Ranking:
        if lab.arch.sparse or lab.arch.facts.kind != "decoder":
            raise FindError(
                f"{lab.arch.family}: neurons are found in decoders without experts; "
                "find heads or a direction instead"
            )
        return self._by_auroc(lab) if self.method == "auroc" else self._by_choice(lab)

    def propose(self, lab: Lab, ranking: Ranking, chosen: Sequence[int]) -> Proposal:
        layers, neurons = ranking.column("layer"), ranking.column("neuron")
        return _proposal(Neuron(int(layers[i]), int(neurons[i])) for i in chosen)

    def draw(
        self, lab: Lab, ranking: Ranking, chosen: Sequence[int], generator: np.random.Generator
    ) -> Proposal:
        """As many of all the model's neurons that were not chosen: few of them are ranked."""
        width = lab.arch.sizes["mlp_width"]
        places = zip(ranking.column("layer"), ranking.column("neuron"), strict=True)
        flat = [int(layer) * width + int(neuron) for layer, neuron in places]
        rest = np.setdiff1d(np.arange(_count(lab.arch)), [flat[index] for index in chosen])
        drawn = generator.choice(rest, size=len(chosen), replace=False)
        return _proposal(Neuron(*divmod(int(index), width)) for index in drawn)

    def _by_choice(self, lab: Lab) -> Ranking:
        """By what supports the token that the model chooses at its confusion points."""
        subjects = [Subject("base", lab.runtime, lab.arch), *self._sibling(lab)]
        points = confusion_points(lab, self.new_tokens, self.languages)
        facts = dict(points.facts)
        first = attribution_totals if self.method == "attribution" else gradient_totals
        found = [first(lab, subject, points.prompts) for subject in subjects]
        score = _change(found)
        if self.method == "ablation":
            marked = highest(score, ABLATED)
            found = [ablation_totals(lab, s, points.prompts, marked) for s in subjects]
            score = np.where(marked, _change(found), -np.inf)
            facts["ablated"] = int(marked.sum())
        sums = {s.name: totals.scores for s, totals in zip(subjects, found, strict=True)}
        return _ranking(lab.arch, score, {**sums, "count": found[0].counts}, facts)

    def _by_auroc(self, lab: Lab) -> Ranking:
        """By how well a neuron tells target prompts from preserved ones."""
        sets = {name: token_rows(lab, lab.of_set(name)) for name in ("target", "preserve")}
        if not all(sets.values()):
            raise FindError("method auroc needs prompts of set target and of set preserve")
        area = areas(lab, Subject("base", lab.runtime, lab.arch), tuple(sets.values()))
        facts = {"projection": lab.arch.mlp_inputs[0], **{name: len(p) for name, p in sets.items()}}
        return _ranking(lab.arch, area, {"auroc": area}, facts)

    def _sibling(self, lab: Lab) -> list[Subject]:
        """The tuned sibling, where there is one: a model of the very same sizes."""
        if self.tuned is None:
            return []
        arch = identify(Checkpoint.open(self.tuned))
        if (arch.family, arch.sizes) != (lab.arch.family, lab.arch.sizes):
            raise FindError(
                f"{self.tuned}: a tuned sibling has the model's family and sizes; expected "
                f"{lab.arch.family} {dict(lab.arch.sizes)}, found {arch.family} {dict(arch.sizes)}"
            )
        runtime = TorchRuntime(replace(lab.runtime.model, path=self.tuned), lab.runtime.threads)
        return [Subject("tuned", runtime, arch)]


def _change(found: Sequence[Totals]) -> NDArray[np.float64]:
    """The base's scores, less those of the tuned sibling where there is one."""
    base, *tuned = [totals.scores for totals in found]
    return base - tuned[0] if tuned else base


def _count(arch: Architecture) -> int:
    return arch.layers * arch.sizes["mlp_width"]


def _ranking(
    arch: Architecture,
    score: NDArray[np.float64],
    columns: Mapping[str, NDArray[Any]],
    facts: Mapping[str, Any],
) -> Ranking:
    """The neurons of highest `score` [layers, neurons], with what else `columns` say of each."""
    total = _count(arch)
    most = min(max(1, int(SHARE * total)), int(np.isfinite(score).sum()))
    order = np.argsort(-score, axis=None, kind="stable")[:most]
    listed = [array.ravel()[order].tolist() for array in (score, *columns.values())]
    places = np.unravel_index(order, score.shape)
    rows = zip(*(place.tolist() for place in places), *listed, strict=True)
    more = {"neurons": total, "largest_share": SHARE}
    return Ranking(("layer", "neuron", SCORE, *columns), tuple(rows), facts={**facts, **more})


def _proposal(neurons: Iterable[Neuron]) -> Proposal:
    named = [str(neuron) for neuron in neurons]
    return Proposal(({"op": "neurons", "neurons": named, "factor": 0.0},))
