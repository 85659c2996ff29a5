"""Which module of which layer a conversion loses, halves or doubles an edit in.

The interaction is measured at every boundary of modules, in the four runs as they are, and once
more of each module alone: original and edited model, in both runtimes, get PyTorch's values in the
edited model at every boundary. What the two models then make of the same values is what the edit
does right there, so that an edit that is lost in one layer is not hidden by one that survived in
another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.differential import Limits, Pair
from surgery.evidence import Finding, SiteInteraction
from surgery.export import onnxfile
from surgery.export.lineage import Lineage
from surgery.export.tasks import Task
from surgery.gate import name_rho
from surgery.localize.boundaries import Boundary, find_boundaries, owners_of
from surgery.localize.runs import Arrays, Runs
from surgery.metrics.distance import InteractionSums
from surgery.policy import INTERACTION_MAX_NOISE_RATIO, INTERACTION_MAX_RATIO
from surgery.stimuli import Batch

SURVIVED, CHANGED = "survived", "the edit was changed"
MOST = 4
"""How many more wrong modules are told besides the first."""
SIDES = {"o": "C_o", "e": "C_e"}


@dataclass(frozen=True)
class EditTrace:
    """The interaction at every site in the order of the edited graph; `note`: why there is none."""

    rows: tuple[SiteInteraction, ...]
    batch: str
    note: str = ""

    @property
    def wrong(self) -> tuple[SiteInteraction, ...]:
        return tuple(row for row in self.rows if row.wrong)

    @property
    def clean(self) -> bool:
        return bool(self.rows) and not self.wrong and not self.note

    def __str__(self) -> str:
        if self.note:
            return f"where the edit goes another way was not found: {self.note}"
        if not self.wrong:
            return "every module by itself does with the edit what PyTorch does"
        first, *others = self.wrong
        also = "".join(f"; {_told(row)}" for row in others[:MOST])
        also += f"; and {len(others) - MOST} more" if len(others) > MOST else ""
        kept = [row.site for row in self.rows if row.word == SURVIVED]
        survived = f"; it survived at {', '.join(kept)}" if kept else ""
        return f"{_told(first)}{also}{survived}"

    def findings(self) -> Iterator[Finding]:
        """The first module that is wrong, by what became of the edit; where there is none, why."""
        if self.wrong:
            first = self.wrong[0]
            named = first.word or "wrong value"
            yield Finding(
                "localize", named, f"R_e/{first.site}", str(self), first.own_ratio,
                INTERACTION_MAX_RATIO,
            )  # fmt: skip
        else:
            yield Finding("localize", "not found", "R_e", str(self))


def _told(row: SiteInteraction) -> str:
    where = row.site if row.layer is None else f"{row.site} (layer {row.layer})"
    if not row.word:
        return (
            f"the runtimes disagree at {where} by {row.own_noise_ratio:.3g} times noise, where the "
            "edit itself does nothing beyond noise"
        )
    return (
        f"{row.word} at {where}: ||I||/||E|| = {row.own_ratio:.3g}, rho = {row.own_rho:+.3f} of "
        "that module alone"
    )


def trace_edit(
    pairs: Mapping[str, Pair],
    task: Task,
    batch: Batch,
    lineages: Mapping[str, Lineage],
    scratch: Path,
    limits: Limits | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> EditTrace:
    """The interaction at every boundary that both graphs have, on one batch; `pairs` are those of
    `C_o` and `C_e`.

    Raises what `localize` raises.
    """
    sides = {}
    for name, edge in SIDES.items():
        folder = scratch / name
        folder.mkdir()
        runs = Runs(pairs[edge], task, batch, folder, limits or Limits())
        sides[name] = _Side.of(runs, lineages[edge])
    return _Tracer(sides["o"], sides["e"], batch, progress).run()


@dataclass(frozen=True)
class _Side:
    """One pair: its runs, and its boundaries by site in the graph's order."""

    runs: Runs
    boundaries: Mapping[str, Boundary]

    @classmethod
    def of(cls, runs: Runs, lineage: Lineage) -> _Side:
        arch = identify(Checkpoint.open(runs.pair.model))
        graph = onnxfile.read(runs.pair.onnx, runs.pair.initializers).graph
        owners = owners_of(((row.name, row.tensors) for row in lineage.rows), arch)
        found = find_boundaries(graph, owners, arch)
        return cls(runs, {boundary.site: boundary for boundary in found})

    def torch(self, dtype: str, given: Arrays | None = None) -> Arrays:
        return self.runs.torch(list(self.boundaries.values()), dtype, given)

    def onnx(self, shapes: Mapping[str, tuple[int, ...]], given: Arrays | None = None) -> Arrays:
        """Values by site; those of `given` in the graph's own `shapes`."""
        names = {boundary.value: site for site, boundary in self.boundaries.items()}
        forced = {
            self.boundaries[site].value: array.reshape(shapes[site])
            for site, array in (given or {}).items()
        }
        found = self.runs.onnx(list(names), forced)
        return {site: found[value] for value, site in names.items()}


class _Tracer:
    def __init__(
        self, original: _Side, edited: _Side, batch: Batch, progress: Callable[[str], None]
    ) -> None:
        self._o, self._e, self._batch, self._progress = original, edited, batch, progress

    def run(self) -> EditTrace:
        self._progress("the four runs at every boundary")
        free = {"T_o": self._o.torch("float32"), "T_e": self._e.torch("float32")}
        wide = {"T_o": self._o.torch("float64"), "T_e": self._e.torch("float64")}
        free |= {"R_o": self._o.onnx({}), "R_e": self._e.onnx({})}
        sites = [site for site in self._e.boundaries if _alike(site, free)]
        if not sites:
            note = "the graphs have no boundary of modules in common"
            return EditTrace((), self._batch.name, note)
        self._progress("each module from the same values")
        given = {site: free["T_e"][site] for site in sites}
        own = {"T_o": self._o.torch("float32", given), "T_e": self._e.torch("float32", given)}
        for name, side in (("R_o", self._o), ("R_e", self._e)):
            shapes = {site: free[name][site].shape for site in sites}
            own[name] = side.onnx(shapes, given)
        rows = (self._row(site, free, own, wide) for site in sites)
        return EditTrace(tuple(rows), self._batch.name)

    def _row(
        self, site: str, free: dict[str, Arrays], own: dict[str, Arrays], wide: dict[str, Arrays]
    ) -> SiteInteraction:
        references = {name: self._real(values[site]) for name, values in wide.items()}
        whole, alone = InteractionSums(), InteractionSums()
        for sums, runs in ((whole, free), (alone, own)):
            shape = runs["T_e"][site].shape
            values = {name: self._real(found[site].reshape(shape)) for name, found in runs.items()}
            sums.add(values, references if sums is whole else {"T_e": references["T_e"]})
        wrong, word = _word(alone)
        return SiteInteraction(
            site,
            self._e.boundaries[site].layer,
            whole.effect.l2,
            whole.ratio,
            whole.rho,
            alone.effect.l2,
            alone.ratio,
            alone.rho,
            alone.noise_ratio,
            wrong,
            word,
        )

    def _real(self, array: NDArray[Any]) -> NDArray[Any]:
        mask = self._batch.attention_mask.astype(bool)
        return array[mask] if array.shape[:2] == mask.shape else array


def _alike(site: str, runs: Mapping[str, Arrays]) -> bool:
    """Whether all four runs have a value there, of one size."""
    return len({values[site].size if site in values else -1 for values in runs.values()}) == 1


def _word(sums: InteractionSums) -> tuple[bool, str]:
    """Whether a module's interaction is wrong, as the gate would have it, and what became of the
    edit; no word where the effect is no yardstick."""
    beyond = not sums.noise_ratio <= INTERACTION_MAX_NOISE_RATIO
    if not sums.effect.l2 > INTERACTION_MAX_NOISE_RATIO * sums.noise_l2:
        return beyond, ""
    wrong = beyond and not sums.ratio <= INTERACTION_MAX_RATIO
    return wrong, (name_rho(sums.rho) or CHANGED) if wrong else SURVIVED
