"""Layers, or their attention or MLPs, that turn a prediction away from what is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.files import sha256_file
from surgery.edits.layers import LayersEdit
from surgery.errors import FindError
from surgery.find.interface import Finder, Lab, Proposal, Ranking
from surgery.find.prompts.rows import inputs_of, pieces, refuse_encoder, token_rows
from surgery.find.prompts.watched import Watched, watch
from surgery.find.scores.lens import Lens, Training, fit, load_lens
from surgery.find.scores.readings import Read, Removed, read
from surgery.find.scores.stream import Stream
from surgery.find.tables import by_score

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Layers(Finder):
    """What each layer does to the goal's answer at the last position: by what the lens reads after
    it less before it (`logit_lens`, `tuned_lens`), or by what is lost without it (`ablation`).

    part: attn, mlp or both, which is what is removed. against: the name of the answers
    opposed to the goal's, by default all others. lens: a file of translators to use in place of
    training them. steps, rate: of that training.
    """

    kind: ClassVar[str] = "layers"
    methods: ClassVar[tuple[str, ...]] = ("logit_lens", "tuned_lens", "ablation")
    sizes: ClassVar[tuple[int, ...]] = (1, 2)

    method: str = "logit_lens"
    part: Literal["attn", "mlp", "both"] = "both"
    against: str | None = None
    lens: Path | None = None
    steps: int = 200
    rate: float = 1e-3

    def rank(self, lab: Lab) -> Ranking:
        refuse_encoder(lab, "find layers")
        self._refuse()
        watched = watch(lab, self.against)
        if self.method == "ablation":
            return self._ablation(lab, watched)
        return self._reading(lab, watched)

    def propose(self, lab: Lab, ranking: Ranking, chosen: Sequence[int]) -> Proposal:
        numbers = ranking.column("layer")
        layers = [int(numbers[index]) for index in chosen]
        entry = {"op": "layers", "layers": layers, "factor": 0.0, "part": self.part}
        return Proposal((entry,), ranking.arrays)

    def draw(
        self, lab: Lab, ranking: Ranking, chosen: Sequence[int], generator: np.random.Generator
    ) -> Proposal:
        """As many other layers; no lens is to be kept for them."""
        return replace(super().draw(lab, ranking, chosen, generator), tensors={})

    def _refuse(self) -> None:
        """Raises `FindError` for options that do not go together."""
        if self.method == "tuned_lens" and self.part != "both":
            raise FindError(
                "tuned_lens reads between layers, not within them: its part is both; attn and mlp "
                "go with logit_lens or ablation"
            )
        if self.lens is not None and self.method != "tuned_lens":
            raise FindError(f"a lens is for tuned_lens, not for {self.method}")
        if self.steps < 1 or not 0 < self.rate < np.inf:
            raise FindError("a lens is trained by at least one step, at a rate above 0")

    def _reading(self, lab: Lab, watched: Watched) -> Ranking:
        stream = Stream(lab.live, lab.arch)
        lens, facts, arrays = self._lens(lab, stream)
        removed = None if self.part == "both" else _without(lab, "mlp")
        found = read(lab, stream, watched, lens, removed)
        told = {**_facts(watched), **facts, **_course(found)}
        told["score"] = "margin read before the layer less that after it, in nats"
        return by_score(_columns(found, self.part), told, arrays)

    def _lens(
        self, lab: Lab, stream: Stream
    ) -> tuple[Lens | None, dict[str, Any], Mapping[str, NDArray[Any]]]:
        """The translators, what to tell of them, and what of them is to be kept."""
        if self.method == "logit_lens":
            return None, {}, {}
        if self.lens is not None:
            loaded = load_lens(self.lens, lab.arch.layers, lab.arch.width)
            return loaded, {"lens": f"sha256:{sha256_file(self.lens)}"}, {}
        rows = tuple(token_rows(lab, lab.train))
        lens = fit(lab, stream, Training(rows, self.steps, self.rate, lab.seed))
        told = {"prompts": len(rows), "steps": self.steps, "rate": self.rate, "seed": lab.seed}
        return lens, {"lens": told}, lens.tensors()

    def _ablation(self, lab: Lab, watched: Watched) -> Ranking:
        base = lab.journal.array("margins", lambda: _margins(lab, watched))
        moved = np.empty((lab.arch.layers, len(base)))
        for layer in range(lab.arch.layers):
            lab.progress("removing layers", layer, lab.arch.layers)

            def compute(layer: int = layer) -> Floats:
                with _without(lab, self.part)(layer):
                    return _margins(lab, watched)

            moved[layer] = lab.journal.array(f"margins without {layer}", compute) - base
        spread = moved.std(axis=1) / np.sqrt(len(base))
        columns = {"layer": np.arange(len(moved)), "score": moved.mean(axis=1), "spread": spread}
        told = {**_facts(watched), "margin": float(base.mean())}
        told["score"] = "change of the margin when the layer is removed, in nats"
        return by_score(columns, told)


def _facts(watched: Watched) -> dict[str, Any]:
    return {"prompts": len(watched.rows), "left_out": watched.left_out}


def _without(lab: Lab, part: Literal["attn", "mlp", "both"]) -> Removed:
    """While entered, `part` of the layer that is named adds nothing to the live model's stream."""

    def removed(layer: int) -> AbstractContextManager[None]:
        return LayersEdit((layer,), 0.0, part).hook(lab.live, lab.arch, None)

    return removed


def _margins(lab: Lab, watched: Watched) -> Floats:
    """The margin [n] of every prompt, of the live model as it is."""
    import torch

    found = []
    for part in pieces(len(watched.rows), lab.budget):
        with torch.no_grad():
            inputs = inputs_of(lab.runtime, watched.rows[part])
            logits = lab.live(**inputs, use_cache=False).logits[:, -1]
            found.append(watched.margins(logits, part).numpy())
    return np.concatenate(found)


def _columns(found: Read, part: str) -> dict[str, NDArray[Any]]:
    """A number for each layer: what the lens reads before and after it, as means over prompts."""
    before, after = found.margin[:, :-1], found.margin[:, 1:]
    if part == "attn":
        after = found.mid
    elif part == "mlp":
        before = found.mid
    layers = np.arange(before.shape[1])
    return {
        "layer": layers,
        "score": (before - after).mean(axis=0),
        "before": before.mean(axis=0),
        "after": after.mean(axis=0),
        "answer": found.answer[:, 1:].mean(axis=0),
        "rank": np.median(found.rank[:, 1:], axis=0),
        "top": found.top[:, 1:].mean(axis=0),
        "top_rank": np.median(found.top_rank[:, 1:], axis=0),
        "kl": found.kl[:, 1:].mean(axis=0),
        "turns": (found.turns()[:, None] == layers + 1).mean(axis=0),
    }


def _course(found: Read) -> dict[str, Any]:
    """What is read before the first layer, and where predictions turn."""
    turns = found.turns()
    return {
        "before_first_layer": {
            "margin": float(found.margin[:, 0].mean()),
            "answer": float(found.answer[:, 0].mean()),
            "rank": float(np.median(found.rank[:, 0])),
            "top": float(found.top[:, 0].mean()),
            "top_rank": float(np.median(found.top_rank[:, 0])),
            "kl": float(found.kl[:, 0].mean()),
            "turned": float((turns == 0).mean()),
        },
        "median_turn": float(np.median(turns - 1)),
    }
