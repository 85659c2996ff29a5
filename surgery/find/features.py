"""`find features`: which features of a sparse autoencoder to take out, or to add.

- `difference`: those more active on the target prompts than on the preserve prompts, by the
  difference of their means;
- `attribution`: those without which the goal's answer would gain or lose most, to first order;
- `direct`: the same by what they write straight to the logits: see `feature_effects`.

A patch that takes a feature out (`orthogonalize`, `z_project`) and one that adds it (`steer_bias`,
`rank1`, `append_neuron`) turn effects opposite ways; the difference ranks alike for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from surgery.edits import OPS
from surgery.edits.autoencoders import Autoencoder, opened
from surgery.edits.autoencoders.encoding import read_encoder
from surgery.edits.autoencoders.hooks import MLP_INPUT, Point, point_of
from surgery.errors import EditError, FindError, RecipeError
from surgery.find.interface import SCORE, Entry, Finder, Lab, Proposal, Ranking
from surgery.find.prompts.questions import questions_of
from surgery.find.prompts.rows import Row, inputs_of, is_real, pieces, prompts_of, refuse_encoder
from surgery.find.scores.feature_effects import Z_SITE, Site, attribution, direct
from surgery.find.scores.margins import pairs_of
from surgery.find.tables import by_score
from surgery.recipe import Recipe, RecipeFolder

Sums = Mapping[str, NDArray[np.float64]]

TARGET, PRESERVE = "target", "preserve"
REMOVING = ("orthogonalize", "z_project")
ON_WRITERS = ("orthogonalize", "rank1")
POSITIONS = ("mean", "last")


@dataclass(frozen=True, kw_only=True)
class Features(Finder):
    """sae: the autoencoder's folder. patch: what the recipe does with the features, by default
    `z_project` for an autoencoder of attention's heads and else `orthogonalize`, `strength` times.
    position: activations are taken at the `last` token of a prompt, or as the `mean` over all.
    steps: over how many points attribution takes the gradient's mean. hook: where the autoencoder
    belongs, if its files do not say. pickle: an `ae.pt` may be read, its tensors alone.
    approximate: orthogonalize also where norms rescale what is written.
    """

    kind: ClassVar[str] = "features"
    methods: ClassVar[tuple[str, ...]] = ("difference", "attribution", "direct")
    sizes: ClassVar[tuple[int, ...]] = (1, 3, 5, 11, 25)

    sae: Path
    method: str = "difference"
    patch: str | None = None
    strength: float = 1.0
    position: str = "mean"
    steps: int = 1
    hook: str | None = None
    pickle: bool = False
    approximate: bool = False

    def rank(self, lab: Lab) -> Ranking:
        """Columns: `feature`, `score`, and, by difference, the mean activation on both sets, else
        the effect of taking it out and the mean activation on the target prompts; `frequency` is
        the share of target prompts on which it is active."""
        self._check(lab)
        with self._opened() as sae:
            point = point_of(sae, self.hook, lab.arch)
            norms = np.linalg.norm(sae.tensors["W_dec"].single(), axis=1)
            usable = np.flatnonzero(np.isfinite(norms) & (norms > 0))
            if not len(usable):
                raise FindError(f"{sae.path}: every decoder row is zero")
            self._try(lab, point, int(usable[0]))
            site = Site(lab.live, lab.arch, point, read_encoder(sae))
            if point.site == MLP_INPUT and self.method != "difference":
                raise FindError(
                    f"{sae.path}: reads what an MLP reads and would write what it writes, so that "
                    "no feature can be taken out; use --method difference"
                )
        measure = self._difference if self.method == "difference" else self._effects
        return self._ranking(point, usable, measure(lab, site))

    def propose(self, lab: Lab, ranking: Ranking, chosen: Sequence[int]) -> Proposal:
        features = ranking.column("feature")
        entry = self._entry(
            Point(int(ranking.facts["layer"]), str(ranking.facts["site"])),
            [int(features[index]) for index in chosen],
        )
        return Proposal((entry,), untie=lab.arch.tied and entry["patch"] in ON_WRITERS)

    def draw(
        self, lab: Lab, ranking: Ranking, chosen: Sequence[int], generator: np.random.Generator
    ) -> Proposal:
        """Of the features that are active on the target prompts: silent ones do nothing, and
        would make anything look better than chance."""
        active = [index for index, share in enumerate(ranking.column("frequency")) if share > 0]
        pool = sorted(set(active) - set(chosen))
        if len(pool) < len(chosen):
            return super().draw(lab, ranking, chosen, generator)
        drawn = generator.choice(pool, size=len(chosen), replace=False)
        return self.propose(lab, ranking, [int(index) for index in drawn])

    def _check(self, lab: Lab) -> None:
        refuse_encoder(lab, "find features")
        if self.position not in POSITIONS:
            raise FindError(f"position is {self.position!r}; expected {' or '.join(POSITIONS)}")
        if self.steps < 1:
            raise FindError(f"steps is {self.steps}; expected at least 1")

    @contextmanager
    def _opened(self) -> Iterator[Autoencoder]:
        with opened(str(self.sae), self._files(), pickle=self.pickle) as sae:
            yield sae

    def _files(self) -> RecipeFolder:
        """The autoencoder's folder read as a recipe in the working folder would read it."""
        return RecipeFolder(Recipe((), False, False, "", "find features", Path.cwd(), True))

    def _entry(self, point: Point, features: list[int]) -> Entry:
        patch = self.patch or ("z_project" if point.site == Z_SITE else "orthogonalize")
        flags = {name: True for name in ("pickle", "approximate") if getattr(self, name)}
        return {
            "op": "sae",
            "sae": self.sae,
            "features": features,
            "patch": patch,
            "strength": self.strength,
            "hook": str(point),
            **flags,
        }

    def _try(self, lab: Lab, point: Point, feature: int) -> None:
        """Raises `FindError` where this model has no place for the patch."""
        try:
            fields = {**self._entry(point, [feature]), "sae": str(self.sae)}
            entry = OPS["sae"].model_validate(fields)
            entry.build(lab.arch, self._files())
        except (EditError, RecipeError) as error:
            raise FindError(str(error)) from None
        except ValidationError as error:
            first = error.errors()[0]
            raise FindError(f"{first['loc'][0]}: {first['msg']}") from None

    def _difference(self, lab: Lab, site: Site) -> Sums:
        prompts = {name: prompts_of(lab, name) for name in (TARGET, PRESERVE)}
        found = {name: self._activity(lab, site, name, rows) for name, rows in prompts.items()}
        target, preserve = (found[name]["activation"] for name in (TARGET, PRESERVE))
        return {
            SCORE: target - preserve,
            TARGET: target,
            PRESERVE: preserve,
            "frequency": found[TARGET]["frequency"],
        }

    def _activity(self, lab: Lab, site: Site, name: str, rows: Sequence[Row]) -> Sums:
        """The mean over prompts of each feature's activation, and how often it is active."""

        def of(part: slice) -> dict[str, Any]:
            inputs = inputs_of(lab.runtime, rows[part])
            return self._summed(site.read(inputs)[1], is_real(inputs))

        return _means(lab, f"features on {name}", len(rows), of)

    def _effects(self, lab: Lab, site: Site) -> Sums:
        questions = questions_of(lab, TARGET)

        def of(part: slice) -> dict[str, Any]:
            inputs = inputs_of(lab.runtime, [question.ids for question in questions[part]])
            pairs = pairs_of(site.model, inputs, questions[part])
            if self.method == "direct":
                effects, features = direct(site, inputs, pairs)
            else:
                effects, features = attribution(site, inputs, pairs, self.steps)
            return {"effect": _total(effects), **self._summed(features, is_real(inputs))}

        found = _means(lab, f"{self.method} of features", len(questions), of)
        removes = (self._entry(site.point, [0])["patch"]) in REMOVING
        sign = lab.goal.sign if removes else -lab.goal.sign
        return {SCORE: sign * found["effect"], **found}

    def _summed(self, features: Any, real: Any) -> dict[str, Any]:
        """Over the prompts of a batch: activations, and how many prompts a feature is active on."""
        import torch

        if self.position == "last":
            features, real = features[:, -1:], real[:, -1:]
        lengths = real.sum(1, keepdim=True)
        return {
            "activation": _total(features.sum(1, dtype=torch.float64) / lengths),
            "frequency": _total((features > 0).any(1)),
        }

    def _ranking(self, point: Point, usable: NDArray[Any], columns: Sums) -> Ranking:
        if not np.isfinite(columns[SCORE][usable]).all():
            raise FindError(f"features of {self.sae} have scores that are no numbers")
        facts = {
            "layer": point.layer,
            "site": point.site,
            "features": len(columns[SCORE]),
            "silent": int((columns["frequency"] == 0).sum()),
            "unusable": len(columns[SCORE]) - len(usable),
        }
        own = {name: column[usable] for name, column in columns.items()}
        return by_score({"feature": usable, **own}, facts)


def _means(lab: Lab, name: str, count: int, of: Callable[[slice], dict[str, Any]]) -> Sums:
    """What `of` sums over each batch, over all `count` prompts and divided by them."""
    total: dict[str, Any] = {}
    for part in pieces(count, lab.budget):
        sums = lab.journal.arrays(f"{name}: {part.start} to {part.stop}", partial(of, part))
        total = {key: total.get(key, 0.0) + value for key, value in sums.items()}
        lab.progress(name, part.stop, count)
    return {key: value / count for key, value in total.items()}


def _total(values: Any) -> Any:
    """The sum over prompts [batch, n] in float64, as numpy's array."""
    return values.double().sum(0).numpy()
