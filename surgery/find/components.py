"""Components of the output head, or of what attention heads write, that a behaviour comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Head
from surgery.edits.head_spectrum import refuse_qk
from surgery.edits.lm_head_spectrum import spectrum
from surgery.edits.spectrum import distinct
from surgery.errors import EditError, FindError
from surgery.find.interface import Finder, Lab, Proposal, Ranking
from surgery.find.prompts.rows import refuse_encoder
from surgery.find.prompts.watched import watch
from surgery.find.scores.circuits import WAYS, Readings, Spectra, readings, spectra
from surgery.find.scores.component_effects import removal_effects
from surgery.find.scores.head_input import shift
from surgery.find.scores.weights import StoredReader
from surgery.find.tables import by_score

Floats = NDArray[np.float64]

LM_HEAD, HEAD = "lm_head", "head"
FACTORS = {LM_HEAD: 0.1, HEAD: 0.0}
"""What a component is multiplied by where no factor is named: that of EigenShift's code, and 0."""
STRONGEST = 20
"""How many pairs of whole heads the facts tell of."""
RULE = "mean of v·h at bad steps less that at good ones; the largest entry of each v is positive"


@dataclass(frozen=True, kw_only=True)
class Components(Finder):
    """Singular components: of the output head (`on` lm_head; `eigenshift`), or of each attention
    head's W_OV (`on` head; `singular`, `composition`, `effect`).

    factor: what the chosen ones are multiplied by (0.1 on lm_head, 0 on head). against: the
    name of the answers opposed to the goal's, by default all others. absolute: rank by |Δ|, not Δ.
    fold_norm: spectra with the norm before attention in them. way: q, k or v, how later heads read
    a component; by default the strongest that has a meaning.
    """

    kind: ClassVar[str] = "components"
    methods: ClassVar[tuple[str, ...]] = ("eigenshift", "singular", "composition", "effect")
    sizes: ClassVar[tuple[int, ...]] = (1, 3, 5, 10, 20)

    method: str = "eigenshift"
    on: Literal["lm_head", "head"] = "lm_head"
    factor: float | None = None
    against: str | None = None
    absolute: bool = False
    fold_norm: bool = False
    way: Literal["q", "k", "v"] | None = None

    def rank(self, lab: Lab) -> Ranking:
        refuse_encoder(lab, "find components")
        self._refuse()
        if self.method == "eigenshift":
            return self._eigenshift(lab)
        found = [
            spectra(lab.arch, lab.checkpoint, layer, self.fold_norm)
            for layer in range(lab.arch.layers)
        ]
        scored = {
            "singular": self._singular,
            "composition": self._composition,
            "effect": self._effect,
        }
        return scored[self.method](lab, found)

    def propose(self, lab: Lab, ranking: Ranking, chosen: Sequence[int]) -> Proposal:
        factor = FACTORS[self.on] if self.factor is None else self.factor
        if self.on == LM_HEAD:
            numbers = ranking.column("component")
            named = [int(numbers[index]) for index in chosen]
            entry = {"op": "lm_head_spectrum", "components": named, "factor": factor}
            return Proposal((entry,), untie=lab.arch.tied)
        return Proposal(tuple(self._entries(ranking, chosen, factor)))

    def _refuse(self) -> None:
        """Raises `FindError` for options that do not go together."""
        fits = LM_HEAD if self.method == "eigenshift" else HEAD
        if self.method not in self.methods or self.on != fits:
            ours = [own for own in self.methods if (own == "eigenshift") == (self.on == LM_HEAD)]
            raise FindError(
                f"components on {self.on} are found by {', '.join(ours)}; not by {self.method}"
            )

    def _eigenshift(self, lab: Lab) -> Ranking:
        arch = lab.arch
        head = arch.name(arch.facts.tie.embed if arch.tied else arch.facts.tie.head)
        squares, vectors = spectrum(StoredReader(lab.checkpoint), head, arch.width)
        found = shift(lab, vectors, self.against)
        delta = found.bad - found.good
        score = np.abs(delta) if self.absolute else delta
        columns: dict[str, NDArray[Any]] = {
            "component": np.arange(len(score)),
            "score": score,
            "bad": found.bad,
            "good": found.good,
            "sigma": np.sqrt(squares),
        }
        facts = {
            "score": RULE + (", its size" if self.absolute else ""),
            "bad_steps": found.bad_steps,
            "good_steps": found.good_steps,
            "not_reproduced": found.left_out,
        }
        own = distinct(squares)
        return by_score({name: column[own] for name, column in columns.items()}, facts)

    def _singular(self, lab: Lab, found: Sequence[Spectra]) -> Ranking:
        """By the singular value; `share` is what its square is of the head's."""
        sigma = np.stack([own.sigma for own in found])
        whole = (sigma**2).sum(axis=-1, keepdims=True)
        share = np.divide(sigma**2, whole, out=np.zeros_like(sigma), where=whole > 0)
        return _ranked(found, {"score": sigma, "share": share}, {"score": "singular value of W_OV"})

    def _effect(self, lab: Lab, found: Sequence[Spectra]) -> Ranking:
        watched = watch(lab, self.against)
        effects = removal_effects(lab, watched, found)
        facts = {
            "score": "first-order change of the margin when the component is removed, in nats",
            "prompts": len(watched.rows),
            "left_out": watched.left_out,
        }
        spread = effects.std(axis=0) / np.sqrt(len(effects))
        sigma = np.stack([own.sigma for own in found])
        named = {"score": effects.mean(axis=0), "spread": spread, "sigma": sigma}
        return _ranked(found, named, facts)

    def _composition(self, lab: Lab, found: Sequence[Spectra]) -> Ranking:
        ways, why = self._ways(lab)
        if len(found) < 2:
            raise FindError("composition is of a head with a later one; this model has one layer")
        senders = [self._senders(lab, found, layer, ways) for layer in range(len(found) - 1)]
        named = {
            name: np.stack([sender[name] for sender in senders])
            for name in ("score", "way", "to_layer", "to_head", "whole")
        }
        named["sigma"] = np.stack([own.sigma for own in found[:-1]])
        facts: dict[str, Any] = {
            "score": "greatest composition of the component with any later head",
            "ways": list(ways),
            "left_out": why,
            "strongest": _strongest([sender["wholes"] for sender in senders], ways),
        }
        return _ranked(found[:-1], named, facts)

    def _ways(self, lab: Lab) -> tuple[tuple[str, ...], str]:
        """The ways that have a meaning on this model, and why others do not."""
        if self.way == "v":
            return ("v",), ""
        try:
            refuse_qk(lab.arch, False)
        except EditError as error:
            if self.way is not None:
                raise
            return ("v",), str(error)
        return (self.way,) if self.way else WAYS, ""

    def _senders(
        self, lab: Lab, found: Sequence[Spectra], layer: int, ways: Sequence[str]
    ) -> Mapping[str, NDArray[Any]]:
        """Of each component of a layer [heads, r], the strongest composition, and all of whole
        heads (`wholes` [later layers, ways, heads, heads])."""
        later = range(layer + 1, len(found))
        lab.progress("composition", layer, len(found) - 1)

        def compute() -> dict[str, NDArray[Any]]:
            read = [
                readings(lab.arch, lab.checkpoint, found[layer], to, ways, self.fold_norm)
                for to in later
            ]
            return {**_best(read, layer + 1), "wholes": np.stack([own.wholes for own in read])}

        return lab.journal.arrays(f"composition of layer {layer}", compute)

    def _entries(
        self, ranking: Ranking, chosen: Sequence[int], factor: float
    ) -> list[Mapping[str, Any]]:
        """One entry for each head, heads and components in the order of the ranking."""
        by_head: dict[Head, list[int]] = {}
        for index in chosen:
            layer, head, component = (int(number) for number in ranking.rows[index][:3])
            by_head.setdefault(Head(layer, head), []).append(component)
        return [
            {
                "op": "head_spectrum",
                "heads": [str(head)],
                "circuit": "ov",
                "components": components,
                "factor": factor,
                "fold_norm": self.fold_norm,
            }
            for head, components in by_head.items()
        ]


def _best(read: Sequence[Readings], first: int) -> dict[str, NDArray[Any]]:
    """The strongest reading of each component [heads, r] by layers from `first` on."""
    parts = np.stack([own.parts for own in read])
    wholes = np.stack([own.wholes for own in read])
    layers, ways, heads, rank, later = parts.shape
    flat = parts.transpose(2, 3, 0, 1, 4).reshape(heads, rank, -1)
    best = flat.argmax(axis=-1)
    layer, way, head = np.unravel_index(best, (layers, ways, later))
    sender = np.arange(heads)[:, None]
    return {
        "score": flat.max(axis=-1),
        "way": way,
        "to_layer": layer + first,
        "to_head": head,
        "whole": wholes[layer, way, sender, head],
    }


def _strongest(wholes: Sequence[Floats], ways: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs of heads that compose most as wholes."""
    found = [
        (float(score), Head(layer, head), ways[way], Head(layer + 1 + step, to))
        for layer, own in enumerate(wholes)
        for (step, way, head, to), score in np.ndenumerate(own)
    ]
    return [
        {"from": str(a), "to": str(b), "way": way, "composition": score}
        for score, a, way, b in sorted(found, key=lambda pair: -pair[0])[:STRONGEST]
    ]


def _ranked(
    found: Sequence[Spectra], named: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]
) -> Ranking:
    """Every component that has a direction of its own, by falling score; `named` are columns
    [layers, heads, r], of which one is the score."""
    own = np.stack([spectra_.own for spectra_ in found])
    layer, head, component = np.nonzero(own)
    places = {"layer": layer, "head": head, "component": component}
    return by_score({**places, **{name: column[own] for name, column in named.items()}}, facts)
