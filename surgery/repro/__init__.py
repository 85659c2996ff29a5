"""Bundles that show a fault by themselves: the least of the graph that fails, and what it needs.

Of a fault that was localised it is the part between the edges of modules that brings the error in,
of any other the model's own output, or, of a model with caches, the first place that is wrong, at
once or over PyTorch's caches. From there it goes on by halves, over PyTorch's values and over
those that a fresh export of ours has too, then over rows, positions and weights; whatever is left
fails as the whole did. Beside it lies the nearest model that is right.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint import Staging
from surgery.differential import Limits, Pair, Workload
from surgery.errors import SurgeryError
from surgery.evidence import EDGES, Finding
from surgery.export.lineage import Lineage
from surgery.export.tasks import Task
from surgery.gate import Verdict
from surgery.localize import Localization
from surgery.repro.making import Bundle, Reproducer, Wanted
from surgery.stimuli import Batch
from surgery.taxonomy import fingerprint

__all__ = ["Bundle", "Conversion", "Repros", "write_bundles"]


@dataclass(frozen=True)
class Repros:
    """What was written, and of what else no bundle could be made, with why."""

    verdict: str
    bundles: tuple[Bundle, ...] = ()
    missed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def text(found: Repros, output: Path) -> str:
    """What was written to `output`, for people."""
    lines = [
        f"{output / bundle.fingerprint}: {bundle.site}, {bundle.nodes} operators, "
        f"{bundle.bytes} bytes; right with {bundle.changed or 'nothing that was tried'}"
        for bundle in found.bundles
    ]
    lines += [f"no bundle of {why}" for why in found.missed]
    return "\n".join(lines) or f"verdict: {found.verdict}; no conversion is wrong in what it gives"


@dataclass(frozen=True)
class Conversion:
    """One edge, with what its localisation found, if anything was compared."""

    edge: str
    pair: Pair
    task: Task
    workload: Workload
    lineage: Lineage
    localization: Localization | None

    def wanted(self, findings: tuple[Finding, ...]) -> Iterator[Wanted]:
        """What to make bundles of: the faults that were localised, and what is wrong with the
        model's outputs; where there is neither, their numbers on the batch furthest off."""
        corner = EDGES[self.edge][1]
        local = list(self._localized(corner))
        yield from local
        mine = [f for f in findings if f.site.split("/")[0] in (corner, self.edge)]
        broken = [f for f in mine if f.stage in ("interface", "run")]
        yield from (Wanted(finding) for finding in broken[:1])
        if self.localization and not local and not broken:
            wrong = [f for f in mine if f.stage in ("conversion", "embedding")]
            batch = self._batch(self.localization)
            yield from (Wanted(finding, batch=batch) for finding in wrong[:1])

    def _localized(self, corner: str) -> Iterator[Wanted]:
        own = self.localization
        if own is not None and own.faults:
            for finding, fault in zip(own.findings(corner), own.faults, strict=True):
                yield Wanted(finding, fault.site, self._batch(own))

    def _batch(self, own: Localization) -> Batch:
        return next(batch for batch in self.workload.batches if batch.name == own.batch)


def write_bundles(
    conversions: Iterable[Conversion],
    verdict: Verdict,
    staging: Staging,
    scratch: Path,
    limits: Limits,
    progress: Callable[[str], None],
) -> Repros:
    """A folder for each fingerprint; nothing is committed where there is none. What a bundle cannot
    be made of is told and hides no other."""
    bundles: dict[str, Bundle] = {}
    missed: dict[str, str] = {}
    for conversion in conversions:
        folder = scratch / f"repro-{conversion.edge}"
        folder.mkdir()
        wanted = list(conversion.wanted(verdict.findings))
        if wanted:
            maker = Reproducer(
                conversion.pair,
                conversion.task,
                conversion.workload,
                conversion.lineage,
                folder,
                limits,
                progress,
            )
            _write(wanted, maker, staging, bundles, missed)
    if bundles:
        staging.commit()
    others = [why for name, why in missed.items() if name not in bundles]
    return Repros(verdict.verdict, tuple(bundles.values()), tuple(others))


def _write(
    wanted: list[Wanted],
    maker: Reproducer,
    staging: Staging,
    bundles: dict[str, Bundle],
    missed: dict[str, str],
) -> None:
    for each in wanted:
        name = fingerprint(each.finding)
        if name in bundles:
            continue
        folder = staging.path / name
        folder.mkdir()
        try:
            made = maker.make(each, folder)
        except SurgeryError as error:
            made, missed[name] = None, f"{each.finding.site}: {error}"
        if made is not None:
            bundles[name] = made
        else:
            missed.setdefault(name, _unseen(each))
            shutil.rmtree(folder)


def _unseen(wanted: Wanted) -> str:
    return (
        f"{wanted.finding.site}: runs of all positions at once, and of more over PyTorch's caches, "
        "give what PyTorch does; what is wrong shows elsewhere, as in generation"
    )
