"""The stages composed: differential test, and the whole way from recipe to verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from surgery.apply import apply
from surgery.checkpoint import Staging
from surgery.differential import DEFAULT_SEED, Limits, Pair, measure, only
from surgery.errors import InputError, NothingCompared
from surgery.evidence import Evidence
from surgery.export import export
from surgery.export.lineage import Lineage
from surgery.gate import FAIL, judge
from surgery.localize import Localization
from surgery.pipeline.causes import lineages_of, localized, traced
from surgery.pipeline.inputs import Read
from surgery.pipeline.judging import judged, with_stale
from surgery.pipeline.pairs import MODEL, ONNX, Comparison, Given, Progress, ask, prepared
from surgery.policy import BUILT_IN, Policy
from surgery.report import Report, render
from surgery.repro import Conversion, Repros, write_bundles

EDITED = "edited"
REPORT_JSON, REPORT_HTML = "report.json", "report.html"

__all__ = [
    "DEFAULT_SEED",
    "EDITED",
    "MODEL",
    "ONNX",
    "REPORT_HTML",
    "REPORT_JSON",
    "diff",
    "localize",
    "repro",
    "silent",
    "validate",
]


def silent(stage: str) -> None:
    """The progress callback of those who do not want any."""


def diff(
    model: Path,
    *,
    onnx: Path | None = None,
    edited: Path | None = None,
    edited_onnx: Path | None = None,
    stimuli: Sequence[Path] = (),
    policy: Policy = BUILT_IN,
    task: str | None = None,
    seed: int = DEFAULT_SEED,
    aa: bool = False,
    limits: Limits | None = None,
    progress: Progress = silent,
    root: Path | None = None,
    stream: bool = False,
    budget: float | None = None,
    batch: str | None = None,
) -> Report:
    """The differential test of checkpoint `model` and, where given, of `edited`.

    An ONNX file that is not given is exported to a temporary folder; one that has a key-value
    cache is judged with it. `budget`: seconds for all corners, spent on further probes; `batch`:
    the one batch to run again, which is never a pass; `aa`: each corner is also run against
    itself; `stream`: memory follows one layer and the embedding, whatever the size of the model.
    The report names files inside `root` relative to it. Raises `InputError` for anything given
    that cannot be used; whatever a corner does is in the report.
    """
    if aa and stream:
        raise InputError("--aa holds whole models in memory: leave it or --stream out")
    given, bounds = Given(model, onnx, edited, edited_onnx), limits or Limits()
    with prepared(given, stimuli, policy, task, seed, bounds, progress) as (run, scratch):
        if batch is not None:
            alone = only(run.asked.workload, batch)
            run = replace(run, asked=replace(run.asked, workload=alone))
        read = Read(tuple(stimuli), root or scratch)
        return judged(run, policy, read, stream=stream, budget=budget, aa=aa)


def localize(
    model: Path,
    *,
    onnx: Path | None = None,
    edited: Path | None = None,
    edited_onnx: Path | None = None,
    stimuli: Sequence[Path] = (),
    policy: Policy = BUILT_IN,
    task: str | None = None,
    seed: int = DEFAULT_SEED,
    limits: Limits | None = None,
    progress: Progress = silent,
) -> dict[str, Localization]:
    """Where each conversion parts from PyTorch, on the input that shows it most; by edge.

    Takes what `diff` takes. Raises `InputError` for anything given that cannot be used, and
    `NothingCompared` where a corner gave nothing to compare.
    """
    given, bounds = Given(model, onnx, edited, edited_onnx), limits or Limits()
    with prepared(given, stimuli, policy, task, seed, bounds, progress) as (run, _):
        evidence, lineages = _measured(run)
        found = localized(run, lineages, evidence)
        if "C_e" in found:
            found["C_e"] = replace(found["C_e"], edit=traced(run, lineages, evidence))
    missing = [edge for edge in run.pairs if edge not in found]
    if missing:
        reasons = "; ".join(fault.message for fault in evidence.faults) or "no output was kept"
        raise NothingCompared(f"{run.pairs[missing[0]].onnx}: nothing to localise: {reasons}")
    return found


def repro(
    model: Path,
    output: Path,
    *,
    onnx: Path | None = None,
    edited: Path | None = None,
    edited_onnx: Path | None = None,
    stimuli: Sequence[Path] = (),
    policy: Policy = BUILT_IN,
    task: str | None = None,
    seed: int = DEFAULT_SEED,
    limits: Limits | None = None,
    progress: Progress = silent,
) -> Repros:
    """A bundle for each fault of the conversions, in a folder of the new folder `output` each;
    none where the verdict is not fail.

    Takes what `diff` takes, and raises what that does.
    """
    given, bounds = Given(model, onnx, edited, edited_onnx), limits or Limits()
    with prepared(given, stimuli, policy, task, seed, bounds, progress) as (run, scratch):
        evidence, lineages = _measured(run)
        verdict = judge(with_stale(run, lineages, evidence), policy)
        found = localized(run, lineages, evidence) if verdict.verdict == FAIL else {}
        wanted, workload = run.asked.task, run.asked.workload
        conversions = [
            Conversion(edge, pair, wanted, workload, lineages[edge], found.get(edge))
            for edge, pair in run.pairs.items()
        ]
        with Staging(output, tuple(pair.model for pair in run.pairs.values())) as staging:
            return write_bundles(conversions, verdict, staging, scratch, bounds, progress)


def validate(
    recipe: Path,
    model: Path,
    output: Path,
    *,
    policy: Policy = BUILT_IN,
    stimuli: Sequence[Path] = (),
    task: str | None = None,
    seed: int = DEFAULT_SEED,
    limits: Limits | None = None,
    allow_outside: bool = False,
    progress: Progress = silent,
    stream: bool = False,
    budget: float | None = None,
) -> Report:
    """Applies `recipe` to `model`, exports both, tests the four corners and writes the report.

    `output` gets `edited/`, `onnx/original/`, `onnx/edited/`, `report.json` and `report.html`,
    whatever the verdict; where an input cannot be used it does not appear at all.
    """
    asked = ask(model, stimuli, policy, task, seed)
    with Staging(output, (model,)) as staging:
        progress("edit")
        edited = staging.path / EDITED
        apply(recipe, model, edited, allow_outside=allow_outside)
        pairs = {
            "C_o": Pair(model, staging.path / ONNX["C_o"] / MODEL),
            "C_e": Pair(edited, staging.path / ONNX["C_e"] / MODEL),
        }
        for edge, pair in pairs.items():
            progress(f"export of {ONNX[edge].removeprefix('onnx/')}")
            export(pair.model, pair.onnx.parent, task=asked.task.name)
        run = Comparison(pairs, asked, limits or Limits(), progress)
        read = Read(tuple(stimuli), staging.path)
        report = judged(run, policy, read, stream=stream, budget=budget)
        staging.write(REPORT_JSON, render(report, "json").encode())
        staging.write(REPORT_HTML, render(report, "html").encode())
        staging.commit()
    return report


def _measured(run: Comparison) -> tuple[Evidence, dict[str, Lineage]]:
    asked = run.asked
    evidence = measure(run.pairs, asked.task, asked.workload, run.limits, run.progress)
    run.progress("lineage")
    return evidence, lineages_of(run)
