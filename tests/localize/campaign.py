"""Seeded faults, one after the other: is each caught, and how near does the localisation come?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
from corners import Here
from here import in_this_process
from models import deep, make
from numpy.typing import NDArray

from surgery import pipeline
from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.errors import SurgeryError
from surgery.export import export
from surgery.export.lineage import trace
from surgery.localize import Localization
from surgery.report import Report
from tests.localize.seeds import SEEDS, Target, Truth, Unfit
from tests.localize.variants import variants

VOCAB = 200
LAYERS = 3
CATCH = 10.0
"""Errors above this many times the noise must be caught."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "gpt2": {}, "qwen3": {}, "bert": {}, "gemma2": {"sliding_window": 8},
    "mistral": {"sliding_window": 8}, "phi3": {}, "gpt_neox": {}, "opt": {}, "mixtral": {},
    "bloom": {}, "falcon-new": {},
}  # fmt: skip
"""Models that faults are planted in, with config fields."""


@dataclass(frozen=True)
class Outcome:
    """One mutant: `effect` is max |mutant - clean| over the noise, infinite where it does not run;
    `named` is what the localisation said; `layer`, `module` and `operator`: whether rightly, None
    where there is nothing to localise."""

    model: str
    kind: str
    fault: str
    depth: int
    effect: float
    verdict: str
    symptoms: tuple[str, ...]
    sites: str
    named: str
    layer: bool | None = None
    module: bool | None = None
    operator: bool | None = None
    confirmed: bool | None = None

    @property
    def caught(self) -> bool:
        return self.verdict == "fail"


@dataclass
class Base:
    """A random model, its portable export, and what seeds need to know of both."""

    name: str
    model: Path
    onnx: Path
    root: Path
    here: Here
    other: Path
    _clean: dict[str, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        name: str,
        root: Path,
        here: Here,
        fields: dict[str, Any] | None = None,
        layers: int = LAYERS,
    ) -> Base:
        sizes = {"vocab_size": VOCAB, **deep(name, layers), **(fields or FAMILIES.get(name, {}))}
        model = make(name, root / name / "model", **sizes)
        other = make(name, root / name / "other", seed=7, **sizes)
        with in_this_process():
            made = export(model, root / name / "onnx").model
        return cls(name, model, made, root / name, here, other)

    def target(self, layer: int) -> Target:
        checkpoint, other = Checkpoint.open(self.model), Checkpoint.open(self.other)
        arch = identify(checkpoint)
        with in_this_process():
            rows = trace(self.onnx, self.model).rows
        plain = [row for row in rows if row.tensors and set(row.transform) <= {"none", "transpose"}]
        tensors = {row.tensors[0]: (row.name, "transpose" in row.transform) for row in plain}
        roles = {t: (role.role, role.layer) for t, role in arch.roles.items() if t in tensors}
        model = onnx.load(str(self.onnx))
        return Target(model, layer, tensors, roles, other.read, dict(arch.sizes))

    def plant(self, kind: str, fault: str, layer: int) -> tuple[Path, Truth]:
        """A file with the fault in it, and where it is; raises `Unfit`."""
        target = self.target(layer)
        truth = SEEDS[kind][fault](target)
        path = self.root / "planted.onnx"
        onnx.save(target.model, str(path))
        return path, truth

    def run(self, path: Path, model: Path | None = None) -> tuple[Report, list[Localization]]:
        """`pipeline.diff` of a file, and what it localised."""
        kept: list[Localization] = []
        find = pipeline.find

        def keep(*args: Any) -> Localization:
            kept.append(find(*args))
            return kept[-1]

        with self.here.installed(), patch.object(pipeline, "find", keep):
            report = pipeline.diff(model or self.model, onnx=path)
        return report, kept

    def outputs(self, path: Path) -> dict[str, NDArray[Any]]:
        """ONNX Runtime's first output on the probes, at real positions; nothing where a run or a
        shape fails."""
        from surgery.export import choose_task, onnxfile
        from surgery.policy import BUILT_IN
        from surgery.runtimes import graph
        from surgery.runtimes.onnxruntime import open_session

        task = choose_task(self.model, None)
        asked = pipeline._ask(self.model, (), BUILT_IN, None, pipeline.DEFAULT_SEED)
        found = {}
        try:
            session = open_session(str(path), None, 1)
            signature = graph.signature(onnxfile.read(path), task.output, str(path))
            for batch in asked.workload.batches:
                fed = graph.feed(signature.ports, signature.roles, batch.inputs())
                array = session.run(None, fed)[0]
                found[batch.name] = array[batch.attention_mask.astype(bool)]
        except Exception:  # onnxruntime's errors have no base of their own
            return {}
        return found

    def effect(self, path: Path, noise: float) -> float:
        """max |mutant - clean| over the noise."""
        self._clean = self._clean or self.outputs(self.onnx)
        found = self.outputs(path)
        worst = 0.0
        for name, clean in self._clean.items():
            if name not in found or found[name].shape != clean.shape:
                return float("inf")
            difference = np.abs(found[name].astype(np.float64) - clean).max(initial=0.0)
            worst = max(worst, float("inf") if np.isnan(difference) else float(difference))
        return worst / noise


def judge(base: Base, kind: str, fault: str, layer: int, noise: float) -> Outcome:
    """Plants a fault, runs the differential test and compares what is said with the truth."""
    path, truth = base.plant(kind, fault, layer)
    try:
        report, found = base.run(path)
        symptoms = tuple(sorted({f"{f.stage}: {f.symptom}" for f in report.findings}))
        verdict = report.verdict
    except SurgeryError as error:
        symptoms, found, verdict = (type(error).__name__,), [], "fail"
    effect = base.effect(path, noise)
    told = [str(each) for own in found for each in own.faults] + [o.note for o in found if o.note]
    outcome = Outcome(
        base.name, kind, fault, layer, effect, verdict, symptoms, truth.sites, "; ".join(told)
    )
    if not truth.sites or not found:
        return outcome
    return Outcome(**{**vars(outcome), **compare(truth, found[0])})


def compare(truth: Truth, found: Localization) -> dict[str, bool]:
    """Whether the localisation names the layer, the module, the operator."""
    fault = found.faults[0] if found.faults else None
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


def clean(base: Base) -> Iterator[Outcome]:
    """Right conversions: each must pass, and its localisation find nothing."""
    from surgery.export import choose_task

    causal = choose_task(base.model, None).causal
    made = variants(base.model, base.onnx, base.root / "variants", causal)
    while True:
        try:
            name, model, onnx, entered = next(made)
        except StopIteration:
            return
        except Exception as error:  # PyTorch's exporter cannot take every model
            yield Outcome(base.name, "not made", type(error).__name__, 0, 0.0, "", (), "", "")
            return
        with base.here.installed(), entered():
            report = pipeline.diff(model, onnx=onnx)
            found = pipeline.localize(model, onnx=onnx)["C_o"]
        symptoms = tuple(sorted({f"{f.stage}: {f.symptom}" for f in report.findings}))
        verdict = report.verdict if found.clean else "fail"
        named = "; ".join(map(str, found.faults)) + found.note
        yield Outcome(base.name, "clean", name, 0, 0.0, verdict, symptoms, "", named)


def noise_of(report: Report) -> float:
    return min(row.noise_max for row in report.evidence().conversion)


def campaign(
    root: Path,
    families: dict[str, dict[str, Any]],
    progress: Callable[[str], None],
    depths: tuple[int, ...] = (0, LAYERS - 1),
    wanted: Callable[[str, str], bool] = lambda kind, fault: True,
) -> Iterator[Outcome]:
    """Every fault that fits, in every model, at every depth that makes a difference."""
    here = Here(root / "cache")
    for name, fields in families.items():
        base = Base.make(name, root, here, fields)
        report, _ = base.run(base.onnx)
        noise = noise_of(report)
        for outcome in clean(base):
            progress(_line(outcome))
            yield outcome
        seen: set[bytes] = set()
        for kind, seeds in SEEDS.items():
            for fault in filter(partial(wanted, kind), seeds):
                for depth in depths:
                    try:
                        path, _ = base.plant(kind, fault, depth)
                    except (Unfit, StopIteration):
                        continue
                    content = path.read_bytes()
                    if content not in seen:
                        seen.add(content)
                        outcome = judge(base, kind, fault, depth, noise)
                        progress(_line(outcome))
                        yield outcome


def _line(o: Outcome) -> str:
    """One outcome in a line, for whoever waits."""
    marks = [("-", "no", "yes")[0 if m is None else 1 + m] for m in (o.layer, o.module, o.operator)]
    return f"{o.model} {o.kind} {o.fault} {o.depth}: {o.effect:.3g} {o.verdict} {' '.join(marks)}"


def totals(outcomes: list[Outcome]) -> dict[str, Any]:
    """What of the outcomes there is to count."""
    mutants = [o for o in outcomes if o.kind in SEEDS]
    clean = [o for o in outcomes if o.kind == "clean"]
    strong = [o for o in mutants if o.effect > CATCH]
    local = [o for o in mutants if o.layer is not None and o.effect > CATCH]
    return {
        "mutants": len(mutants),
        "kinds": len({o.fault for o in mutants}),
        "models": len({o.model for o in mutants}),
        "no effect": sum(o.effect == 0 for o in mutants),
        f"above {CATCH:g} x noise": len(strong),
        "of these caught": sum(o.caught for o in strong),
        "clean variants": len(clean),
        "false alarms": sum(o.caught for o in clean),
        "localised": len(local),
        "layer right": sum(bool(o.layer) for o in local),
        "module right": sum(bool(o.module) for o in local),
        "operator, constant or tensor right": sum(bool(o.operator) for o in local),
        "confirmed": sum(bool(o.confirmed) for o in local),
    }


def save(outcomes: list[Outcome], folder: Path) -> str:
    """Writes `faults.json` and `faults.md`; the text."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"totals": totals(outcomes), "outcomes": [_plain(o) for o in outcomes]}
    (folder / "faults.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = markdown(outcomes)
    (folder / "faults.md").write_text(text, encoding="utf-8")
    return text


def _plain(outcome: Outcome) -> dict[str, Any]:
    finite = np.isfinite(outcome.effect)
    return {**asdict(outcome), "effect": outcome.effect if finite else str(outcome.effect)}


def markdown(outcomes: list[Outcome]) -> str:
    """Totals, then a row for each fault over all models and depths."""
    lines = [f"- {name}: {number}" for name, number in totals(outcomes).items()]
    head = "| fault | mutants | least effect | caught | layer | module | operator |"
    lines += ["", head, "|---|---|---|---|---|---|---|"]
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.kind in SEEDS:
            groups.setdefault(f"{outcome.kind}: {outcome.fault}", []).append(outcome)
    for name, own in groups.items():
        local = [o for o in own if o.layer is not None]
        counts = [sum(bool(getattr(o, n)) for o in local) for n in ("layer", "module", "operator")]
        told = [f"{c}/{len(local)}" if local else "" for c in counts]
        caught = f"{sum(o.caught for o in own)}/{len(own)}"
        least = min(o.effect for o in own)
        lines.append(f"| {name} | {len(own)} | {least:.3g} | {caught} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"
