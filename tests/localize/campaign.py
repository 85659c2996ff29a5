"""Seeded faults, one after the other: is each caught, and how near does the localisation come?"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from corners import Here

from surgery import pipeline
from surgery.errors import SurgeryError
from surgery.localize import Localization
from surgery.report import Report
from tests.localize import edited, variants
from tests.localize.bases import FAMILIES, VOCAB, Base
from tests.localize.edited import Edited
from tests.localize.outcomes import CLEAN, EDIT, NOT_MADE, Key, Outcome
from tests.localize.seeds import Truth, Unfit, names

__all__ = ["FAMILIES", "VOCAB", "Base", "Campaign", "compare"]

CACHED_KINDS = ("weight", "cache")
"""What is planted in graphs with a cache, besides the caches' own faults."""

Try = Callable[[], Outcome | None]
"""None where a fault does not fit."""
Wanted = Callable[[str, str], bool]
"""Whether a kind and a name are wanted."""


@dataclass(frozen=True)
class Campaign:
    """Everything that is tried on the model `name`; `known` are outcomes of an earlier run."""

    name: str
    root: Path
    known: Mapping[Key, Outcome]
    wanted: Wanted

    def run(self) -> Iterator[Outcome]:
        """Every outcome in a fixed order, those that are known as they are."""
        base = Base.make(self.name, self.root, Here(self.root / "cache"))
        for key, tried in self._tasks(base):
            if self.wanted(*key[:2]):
                found = self.known.get(key) or tried()
                if found is not None:
                    yield found

    def _tasks(self, base: Base) -> Iterator[tuple[Key, Try]]:
        """What there is to try, by kind, name and depth."""
        seen = {outcome.digest for outcome in self.known.values()}
        for kind, fault in names():
            if not base.task.cache or kind in CACHED_KINDS:
                for depth in sorted({0, base.layers // 2, base.layers - 1}):
                    yield (kind, fault, depth), partial(judge, base, kind, fault, depth, seen)
        of = variants.Clean(base.model, base.onnx, base.root / "variants", base.task)
        of.root.mkdir()
        for name in variants.names(base.task):
            yield (CLEAN, name, 0), partial(clean, base, of, name)
        if not base.task.cache:
            for edit in edited.EDITS:
                yield from _edits(base, edit)


def _edits(base: Base, edit: str) -> Iterator[tuple[Key, Try]]:
    of = partial(Edited.make, base, edit)
    yield (CLEAN, f"edited: {edit}", 0), partial(clean_edit, base, of, edit)
    for fault in edited.FAULTS:
        yield (EDIT, f"{edit}: {fault}", 0), partial(judge_edit, base, of, edit, fault)


def judge(base: Base, kind: str, fault: str, layer: int, seen: set[bytes]) -> Outcome | None:
    """Plants a fault, runs the differential test and compares what is said with the truth. None
    where the fault does not fit, or is one that was `seen` at another depth."""
    try:
        path, truth = base.plant(kind, fault, layer)
    except (Unfit, StopIteration):
        return None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest in seen:
        return None
    seen.add(digest)
    try:
        report, found = base.run(path)
        verdict, symptoms = report.verdict, _symptoms(report)
    except SurgeryError as error:
        verdict, symptoms, found = "fail", (f"refused: {type(error).__name__}",), []
    told = [str(each) for own in found for each in own.faults] + [o.note for o in found if o.note]
    right = compare(truth, found[0] if found else None) if _localised(truth, symptoms) else {}
    return Outcome(
        base.name, kind, fault, layer, base.effect(path), verdict, symptoms, truth.sites,
        "; ".join(told), **right, digest=digest,
    )  # fmt: skip


def _localised(truth: Truth, symptoms: tuple[str, ...]) -> bool:
    """Whether there was something to localise: a conversion that ran and was wrong."""
    return bool(truth.sites) and any(text.startswith("conversion: ") for text in symptoms)


def compare(truth: Truth, found: Localization | None) -> dict[str, bool]:
    """Whether the localisation names the layer, the module, the operator."""
    fault = found.faults[0] if found is not None and found.faults else None
    if fault is None:
        return dict.fromkeys(("layer", "module", "operator", "confirmed"), False)
    module = re.fullmatch(truth.sites, fault.site) is not None
    layer = module or _layer(truth.sites) in (_layer(fault.site), None)
    operator = fault.operator
    exact = operator is not None and bool(
        set(truth.tensors) & set(operator.tensors)
        or (truth.constant and truth.constant == operator.constant)
        or operator.value in truth.values
        or set(operator.inputs) & set(truth.values)
    )
    return {"layer": layer, "module": module, "operator": exact, "confirmed": fault.confirmed}


def _layer(site: str) -> int | None:
    digits = [part for part in site.replace("\\", "").replace(".", " ").split() if part.isdigit()]
    return int(digits[0]) if digits else None


def clean(base: Base, of: variants.Clean, name: str) -> Outcome:
    """A right conversion: it must pass, and its localisation find nothing."""
    try:
        made = variants.VARIANTS[name](of)
    except Exception as error:  # PyTorch's exporter cannot take every model
        return Outcome(base.name, NOT_MADE, name, 0, 0.0, "", (type(error).__name__,), "", "")
    try:
        with base.here.installed(), made.entered():
            report = pipeline.diff(made.model, onnx=made.onnx)
            found = pipeline.localize(made.model, onnx=made.onnx)["C_o"]
    except SurgeryError as error:
        return Outcome(base.name, CLEAN, name, 0, 0.0, "fail", (), "", str(error))
    verdict = report.verdict if found.clean else "fail"
    named = "; ".join(map(str, found.faults)) + found.note
    return Outcome(base.name, CLEAN, name, 0, 0.0, verdict, _symptoms(report), "", named)


def clean_edit(base: Base, made: Callable[[], Edited], edit: str) -> Outcome:
    """An edited model with its own right conversion: all four corners must pass."""
    name = f"edited: {edit}"
    try:
        of = made()
    except SurgeryError as error:  # experts have no neurons to name
        return Outcome(base.name, NOT_MADE, name, 0, 0.0, "", (), "", str(error))
    report, _ = base.run(base.onnx, edited=of.model, edited_onnx=of.onnx)
    return Outcome(base.name, CLEAN, name, 0, 0.0, report.verdict, _symptoms(report), "", "")


def judge_edit(base: Base, made: Callable[[], Edited], edit: str, fault: str) -> Outcome | None:
    """The four corners with a wrong file for the edited model: is what happened to the edit said
    in the words that it has?"""
    plant, word = edited.FAULTS[fault]
    try:
        of = made()
    except SurgeryError:
        return None
    path = plant(of, base.root / "planted.onnx")
    if path is None:
        return None
    report, _ = base.run(base.onnx, edited=of.model, edited_onnx=path)
    stages = ("lineage", "interaction")
    told = [f"{f.symptom} {f.message}" for f in report.findings if f.stage in stages]
    named = next((text for text in told if word in text), "; ".join(told))
    return Outcome(
        base.name, EDIT, f"{edit}: {fault}", 0, base.effect(path, of.onnx), report.verdict,
        _symptoms(report), word, named, as_such=any(word in text for text in told),
    )  # fmt: skip


def _symptoms(report: Report) -> tuple[str, ...]:
    return tuple(sorted({f"{f.stage}: {f.symptom}" for f in report.findings}))
