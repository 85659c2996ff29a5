"""The stages composed: differential test, and the whole way from recipe to verdict."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.apply import apply
from surgery.arch import identify
from surgery.checkpoint import Checkpoint, Staging
from surgery.checkpoint.files import sha256_file
from surgery.differential import (
    DEFAULT_SEED,
    Limits,
    Pair,
    Workload,
    explore,
    make_workload,
    measure,
    only,
)
from surgery.errors import InputError, NothingCompared
from surgery.evidence import EDGES, Evidence, Finding
from surgery.export import CACHED, Task, choose_task, export, export_graph, onnxfile
from surgery.export.layouts.linked import links
from surgery.export.lineage import Lineage, trace
from surgery.gate import FAIL, WRONG_SHAPE, judge
from surgery.localize import LIMIT, Localization
from surgery.localize import localize as find
from surgery.localize.edit import EditTrace, trace_edit
from surgery.localize.layers import introduced, streamed
from surgery.localize.supposed import became_of_edit
from surgery.localize.weights import stale_tensors
from surgery.policy import BUILT_IN, Policy
from surgery.process import one_line
from surgery.record import environment
from surgery.report import Report, render
from surgery.repro import Conversion, Repros, write_bundles
from surgery.runtimes.graph import has_cache
from surgery.stimuli import Batch
from surgery.stimuli.prompts import load_stimuli

MODEL = "model.onnx"
EDITED = "edited"
ONNX = {"C_o": "onnx/original", "C_e": "onnx/edited"}
REPORT_JSON, REPORT_HTML = "report.json", "report.html"

Progress = Callable[[str], None]


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
    given = _Given(model, onnx, edited, edited_onnx)
    with _prepared(given, stimuli, policy, task, seed, progress) as (pairs, asked, scratch):
        if batch is not None:
            asked = replace(asked, workload=only(asked.workload, batch))
        bounds = limits or Limits()
        asked = replace(asked, aa=aa)
        place = root or scratch
        return _report(pairs, asked, stimuli, policy, bounds, progress, place, budget, stream)


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
    given = _Given(model, onnx, edited, edited_onnx)
    with _prepared(given, stimuli, policy, task, seed, progress) as (pairs, asked, _):
        bounds = limits or Limits()
        evidence = measure(pairs, asked.task, asked.workload, bounds, progress)
        lineages = _lineages(pairs, progress)
        found = _localized(pairs, lineages, asked, evidence, bounds, progress)
        if "C_e" in found:
            edit = _traced(pairs, lineages, asked, evidence, bounds, progress)
            found["C_e"] = replace(found["C_e"], edit=edit)
    missing = [edge for edge in pairs if edge not in found]
    if missing:
        reasons = "; ".join(fault.message for fault in evidence.faults) or "no output was kept"
        raise NothingCompared(f"{pairs[missing[0]].onnx}: nothing to localise: {reasons}")
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
    given, bounds = _Given(model, onnx, edited, edited_onnx), limits or Limits()
    with _prepared(given, stimuli, policy, task, seed, progress) as (pairs, asked, scratch):
        evidence = measure(pairs, asked.task, asked.workload, bounds, progress)
        lineages = _lineages(pairs, progress)
        evidence = replace(evidence, faults=(*stale_tensors(lineages, pairs), *evidence.faults))
        verdict, found = judge(evidence, policy), dict[str, Localization]()
        if verdict.verdict == FAIL:
            found = _localized(pairs, lineages, asked, evidence, bounds, progress)
        conversions = [
            Conversion(edge, pair, asked.task, asked.workload, lineages[edge], found.get(edge))
            for edge, pair in pairs.items()
        ]
        with Staging(output, tuple(pair.model for pair in pairs.values())) as staging:
            return write_bundles(conversions, verdict, staging, scratch, bounds, progress)


@dataclass(frozen=True)
class _Given:
    """What the user named: an ONNX file that is None is exported."""

    model: Path
    onnx: Path | None
    edited: Path | None
    edited_onnx: Path | None


@contextmanager
def _prepared(
    given: _Given,
    stimuli: Sequence[Path],
    policy: Policy,
    task: str | None,
    seed: int,
    progress: Progress,
) -> Iterator[tuple[dict[str, Pair], _Asked, Path]]:
    """The pairs by edge, what they are asked, and a folder for the time being."""
    if given.edited is None and given.edited_onnx is not None:
        raise InputError("an edited ONNX file needs the edited checkpoint: give --edited too")
    models = {"C_o": given.model} | ({"C_e": given.edited} if given.edited else {})
    files = {"C_o": given.onnx, "C_e": given.edited_onnx}
    _check_same_shape(given.model, given.edited)
    asked = _ask(given.model, stimuli, policy, task, seed)
    for path in filter(None, files.values()):
        progress(f"check of {path}")
        onnxfile.check(path)
        if has_cache(onnxfile.read(path)) and asked.task.causal and not asked.task.cache:
            if task is not None:
                raise InputError(
                    f"{path}: has a key-value cache, which task {task} would leave unseen; "
                    f"give --task {CACHED} or none"
                )
            asked = _ask(given.model, stimuli, policy, CACHED, seed)
    with tempfile.TemporaryDirectory(prefix="surgery-onnx-") as folder:
        scratch = Path(folder)
        pairs = {}
        for edge, model in models.items():
            file = files[edge]
            if file is None:
                progress(f"export of {model}")
            pairs[edge] = (
                Pair(model, file) if file else _convert(model, scratch / ONNX[edge], asked.task)
            )
        yield pairs, asked, scratch


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
    asked = _ask(model, stimuli, policy, task, seed)
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
        bounds = limits or Limits()
        report = _report(
            pairs, asked, stimuli, policy, bounds, progress, staging.path, budget, stream
        )
        staging.write(REPORT_JSON, render(report, "json").encode())
        staging.write(REPORT_HTML, render(report, "html").encode())
        staging.commit()
    return report


def _convert(model: Path, output: Path, task: Task) -> Pair:
    """The model as an ONNX graph in the new folder `output`, whose weights stay where they are;
    those of a folder of links, which ONNX tools refuse to follow, are copied."""
    if links(Checkpoint.open(model)):
        export(model, output, task=task.name)
        return Pair(model, output / MODEL)
    output.mkdir(parents=True)
    export_graph(model, output / MODEL, task=task.name)
    return Pair(model, output / MODEL, initializers=model)


def _check_same_shape(model: Path, edited: Path | None) -> None:
    """Original and edited outputs are subtracted, so both models must be of one shape."""
    original = identify(Checkpoint.open(model))
    other = identify(Checkpoint.open(edited)) if edited else original
    for name in ("vocab", "width", "layers"):
        if (original.family, original.sizes[name]) != (other.family, other.sizes[name]):
            raise InputError(
                f"{edited}: is a {other.family} with {name} {other.sizes[name]}; {model} is a "
                f"{original.family} with {name} {original.sizes[name]}"
            )


@dataclass(frozen=True)
class _Asked:
    """What every corner is asked; made first, so that bad input costs no export."""

    task: Task
    workload: Workload
    aa: bool = False


def _ask(
    model: Path, stimuli: Sequence[Path], policy: Policy, task: str | None, seed: int
) -> _Asked:
    wanted = choose_task(model, task)
    base, given = Checkpoint.open(model), load_stimuli(stimuli)
    return _Asked(wanted, make_workload(base, identify(base), wanted, given, policy, seed))


def _report(
    pairs: dict[str, Pair],
    asked: _Asked,
    stimuli: Sequence[Path],
    policy: Policy,
    limits: Limits,
    progress: Progress,
    root: Path | None = None,
    budget: float | None = None,
    stream: bool = False,
) -> Report:
    lineages: dict[str, Lineage] = {}
    if stream:
        lineages = _lineages(pairs, progress)
        pairs = {edge: streamed(pair, lineages[edge]) for edge, pair in pairs.items()}
    found = explore(pairs, asked.task, asked.workload, policy, limits, progress, budget, asked.aa)
    evidence, asked = found.evidence, replace(asked, workload=found.workload)
    lineages = lineages or _lineages(pairs, progress)
    evidence = replace(evidence, faults=(*stale_tensors(lineages, pairs), *evidence.faults))
    verdict = judge(evidence, policy)
    stages = {finding.stage for finding in verdict.findings}
    extra: list[Finding] = []
    wrong = any(_can_be_localised(finding) for finding in verdict.findings)
    if wrong and stream:
        extra += introduced(evidence)
    elif wrong:
        places = _localized(pairs, lineages, asked, evidence, limits, progress)
        extra += [f for edge, own in places.items() for f in own.findings(EDGES[edge][1])]
    if "interaction" in stages and not stream:
        traced = _traced(pairs, lineages, asked, evidence, limits, progress)
        evidence = replace(evidence, sites=traced.rows)
        extra += traced.findings()
        extra += became_of_edit(
            pairs, asked.task, asked.workload, verdict.findings, limits, progress
        )
    if extra:
        evidence = replace(evidence, faults=(*extra, *evidence.faults))
        verdict = judge(evidence, policy)
    inputs = {
        **{EDGES[edge][0]: _weights(pair.model, root) for edge, pair in pairs.items()},
        **{EDGES[edge][1]: _onnx(pair, root) for edge, pair in pairs.items()},
        **{f"stimuli {number}": _file(path, root) for number, path in enumerate(stimuli)},
        "workload": {"task": asked.task.name, **asked.workload.describe()},
    }
    return Report.build(evidence, verdict, policy, _environment(), inputs)


def _can_be_localised(finding: Finding) -> bool:
    """Errors of a size that noise is not; one told by its distribution alone is within it."""
    return finding.stage == "conversion" and finding.symptom != WRONG_SHAPE


def _lineages(pairs: Mapping[str, Pair], progress: Progress) -> dict[str, Lineage]:
    progress("lineage")
    return {
        edge: trace(pair.onnx, pair.model, initializers=pair.initializers)
        for edge, pair in pairs.items()
    }


def _localized(
    pairs: Mapping[str, Pair],
    lineages: Mapping[str, Lineage],
    asked: _Asked,
    evidence: Evidence,
    limits: Limits,
    progress: Progress,
) -> dict[str, Localization]:
    """Each edge of which anything was compared, on the batch that is furthest off."""
    found = {}
    for edge, pair in pairs.items():
        rows = [row for row in evidence.conversion if row.edge == edge]
        if rows:
            worst = max(rows, key=lambda row: row.ratio_l2).worst.rpartition(" @ ")[0]
            batch = next(b for b in asked.workload.batches if worst in b.rows)

            def report(stage: str, edge: str = edge) -> None:
                progress(f"localising {EDGES[edge][1]}: {stage}")

            try:
                own = find(pair, asked.task, batch, lineages[edge], limits, report)
            except Exception as error:  # whatever a search meets, what was measured stays
                name, text = type(error).__name__, one_line(str(error))
                own = Localization((), (), batch.name, note=f"{name}: {text}")
            wrong = any(max(row.ratio_l2, row.ratio_max) > LIMIT for row in rows)
            found[edge] = replace(own, note=_unseen(batch)) if own.clean and wrong else own
    return found


def _traced(
    pairs: Mapping[str, Pair],
    lineages: Mapping[str, Lineage],
    asked: _Asked,
    evidence: Evidence,
    limits: Limits,
    progress: Progress,
) -> EditTrace:
    """What becomes of the edit in each module, on the batch whose interaction is the largest."""
    if not evidence.stimuli:
        return EditTrace((), "", "the interaction was not measured on any stimulus")
    worst = max(evidence.stimuli, key=lambda row: row.noise_ratio).stimulus
    batch = next(b for b in asked.workload.batches if worst in b.rows)

    def report(stage: str) -> None:
        progress(f"tracing the edit: {stage}")

    with tempfile.TemporaryDirectory(prefix="surgery-edit-") as scratch:
        try:
            return trace_edit(pairs, asked.task, batch, lineages, Path(scratch), limits, report)
        except Exception as error:  # whatever a search meets, what was measured stays
            return EditTrace((), batch.name, f"{type(error).__name__}: {one_line(str(error))}")


def _unseen(batch: Batch) -> str:
    """Why every boundary may be right though the output was not."""
    if batch.split:
        return (
            "every boundary is right where all positions run at once; the output was wrong over "
            "a key-value cache, so look at what goes in and out of the caches"
        )
    return (
        "every boundary is right where its value is also an output of the graph, which keeps "
        "ONNX Runtime from fusing across it; so look at its fusions"
    )


def _weights(folder: Path, root: Path | None) -> dict[str, Any]:
    checkpoint = Checkpoint.open(folder)
    files = ("config.json", *checkpoint.weight_files)
    digests = {file: sha256_file(checkpoint.path(file)) for file in files}
    return {"path": _shown(folder, root), "sha256": digests}


def _onnx(pair: Pair, root: Path | None) -> dict[str, Any]:
    """The graph's file and every file its weights lie in."""
    names = onnxfile.external_files(pair.onnx, pair.initializers)
    files = {pair.onnx.name: pair.onnx} | {name: pair.data / name for name in names}
    digests = {name: sha256_file(file) for name, file in files.items()}
    return {"path": _shown(pair.onnx, root), "sha256": digests}


def _file(path: Path, root: Path | None) -> dict[str, Any]:
    return {"path": _shown(path, root), "sha256": sha256_file(path)}


def _shown(path: Path, root: Path | None) -> str:
    """Paths inside a run's own folder are given relative to it: it is about to be renamed."""
    inside = root is not None and path.is_relative_to(root)
    return str(path.relative_to(root)) if root is not None and inside else str(path)


def _environment() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "onnx", "onnxruntime")
    return {**environment(), **{name: version(name) for name in packages}}
