"""Scores of neurons summed over prompts, group by group, as a search goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.arch import Architecture
from surgery.errors import FindError
from surgery.find.interface import Lab
from surgery.find.prompts.rows import Row, inputs_of
from surgery.find.scores.auroc import auroc, peaks
from surgery.find.scores.neuron_scores import Attribution, Scores, ablation_scores, gradient_scores
from surgery.runtimes.generate import GROUP
from surgery.runtimes.pytorch import TorchRuntime

HIGHEST = 300
"""How many neurons count at each prompt (arXiv 2505.16538, official code)."""
TOGETHER = 32
"""Prompts of one attribution: the head's products with a layer's columns are made once for them."""
WITH_GRADIENTS = 8
"""Prompts that are differentiated together: every activation of theirs is kept."""

Prompts = Sequence[Row]


@dataclass(frozen=True)
class Subject:
    """A model whose neurons are scored, and what it is called."""

    name: str
    runtime: TorchRuntime
    arch: Architecture


@dataclass(frozen=True)
class Totals:
    """Sums over prompts, [layers, neurons]: `scores`, float64, and `counts`, of how many prompts a
    neuron is among the `HIGHEST` of, int64."""

    scores: NDArray[np.float64]
    counts: NDArray[np.int64]


def attribution_totals(lab: Lab, subject: Subject, prompts: Prompts) -> Totals:
    """By attribution; a neuron's score counts at the prompts where it is among the highest."""
    attribution = Attribution(subject.runtime.live, subject.arch)
    layers = range(subject.arch.layers)

    def effects() -> Iterator[Scores]:
        for start, group in _groups(prompts, min(TOGETHER, lab.budget)):
            recorded = attribution.record(inputs_of(subject.runtime, group))
            found = []
            for layer in layers:
                done = start * len(layers) + layer * len(group)
                lab.progress(f"attribution, {subject.name}", done, len(prompts) * len(layers))
                measure = partial(attribution.scores, layer, recorded, lab.budget)
                name = f"attribution {subject.name} {start} {layer}"
                found.append(lab.journal.array(name, measure))
            yield np.stack(found, axis=1)

    return _summed(effects(), subject, cut=True)


def gradient_totals(lab: Lab, subject: Subject, prompts: Prompts) -> Totals:
    """By the gradient, over all prompts."""
    live, arch = subject.runtime.live, subject.arch

    def effects() -> Iterator[Scores]:
        for start, group in _groups(prompts, min(WITH_GRADIENTS, lab.budget)):
            lab.progress(f"gradient, {subject.name}", start, len(prompts))
            measure = partial(gradient_scores, live, arch, inputs_of(subject.runtime, group))
            yield lab.journal.array(f"gradient {subject.name} {start}", measure)

    return _summed(effects(), subject, cut=False)


def ablation_totals(
    lab: Lab, subject: Subject, prompts: Prompts, neurons: NDArray[np.bool_]
) -> Totals:
    """By ablation of the `neurons` [layers, neurons] that are marked, over all prompts."""
    live, arch = subject.runtime.live, subject.arch
    listed = {layer: np.flatnonzero(row).tolist() for layer, row in enumerate(neurons)}

    def effects() -> Iterator[Scores]:
        for start, group in _groups(prompts, 1):
            lab.progress(f"ablation, {subject.name}", start, len(prompts))
            inputs = inputs_of(subject.runtime, group)
            measure = partial(ablation_scores, live, arch, inputs, listed, lab.budget)
            yield lab.journal.array(f"ablation {subject.name} {start}", measure)[None]

    return _summed(effects(), subject, cut=False)


def areas(lab: Lab, subject: Subject, sets: Sequence[Prompts]) -> NDArray[np.float64]:
    """The area under the ROC curve of each neuron's response, [layers, neurons]: prompts of the
    first of two sets against those of the second. Responses are read again for each layer, so
    that those of all layers are never held at once."""

    def responses(number: int, layer: int) -> NDArray[np.float32]:
        groups = _groups(sets[number], GROUP)
        return np.concatenate([_peaks(lab, subject, number, *group)[:, layer] for group in groups])

    found = [auroc(responses(0, n), responses(1, n)) for n in range(subject.arch.layers)]
    return np.stack(found)


def _peaks(lab: Lab, subject: Subject, number: int, start: int, group: Prompts) -> Scores:
    def measure() -> Scores:
        lab.progress(f"responses of set {number + 1} of 2", start, start + len(group))
        return peaks(subject.runtime.live, subject.arch, inputs_of(subject.runtime, group))

    return lab.journal.array(f"peaks {number} {start}", measure)


def _groups(prompts: Prompts, size: int) -> Iterator[tuple[int, Prompts]]:
    for start in range(0, len(prompts), size):
        yield start, prompts[start : start + size]


def _summed(effects: Iterator[Scores], subject: Subject, *, cut: bool) -> Totals:
    """Of effects [n, layers, neurons] of groups of prompts; with `cut`, of the highest alone.

    Raises `FindError` where one is no number, which no order could place.
    """
    shape = (subject.arch.layers, subject.arch.sizes["mlp_width"])
    scores, counts = np.zeros(shape), np.zeros(shape, np.int64)
    for group in effects:
        if not np.isfinite(group).all():
            raise FindError(f"{subject.name}: a neuron's score is NaN or infinite on a prompt")
        for own in group:
            high = highest(own, HIGHEST)
            counts += high
            scores += np.where(high, own, 0) if cut else own
    return Totals(scores, counts)


def highest(scores: NDArray[np.floating[Any]], most: int) -> NDArray[np.bool_]:
    """Which of `scores` are the `most` highest, the first of those that tie."""
    found = np.zeros(scores.size, bool)
    found[np.argsort(-scores, axis=None, kind="stable")[:most]] = True
    return found.reshape(scores.shape)
