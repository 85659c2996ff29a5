"""From a comparison to its report: measured, judged, and what fails explained and judged anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from surgery.differential import Workload, explore
from surgery.evidence import EDGES, Evidence, Finding
from surgery.gate import WRONG_SHAPE, judge
from surgery.localize.layers import introduced, streamed
from surgery.localize.supposed import became_of_edit
from surgery.localize.weights import stale_tensors
from surgery.pipeline.causes import Lineages, lineages_of, localized, traced
from surgery.pipeline.inputs import Read, versions
from surgery.pipeline.pairs import Comparison
from surgery.policy import Policy
from surgery.report import Report


def judged(
    run: Comparison,
    policy: Policy,
    read: Read,
    *,
    stream: bool = False,
    budget: float | None = None,
    aa: bool = False,
) -> Report:
    """The report of a comparison; the other options are `diff`'s."""
    with ThreadPoolExecutor(2) as beside:  # both read every byte: the first corner need not wait
        files = beside.submit(read.described, run.pairs)
        lineages = beside.submit(lineages_of, run)
        evidence, workload = _measured(run, policy, lineages.result, stream, budget, aa)
        task = {"task": run.asked.task.name, **workload.describe()}
        inputs = {**files.result(), "workload": task}
    return Report.build(evidence, judge(evidence, policy), policy, versions(), inputs)


def _measured(
    run: Comparison,
    policy: Policy,
    lineages: Callable[[], Lineages],
    stream: bool,
    budget: float | None,
    aa: bool,
) -> tuple[Evidence, Workload]:
    if stream:
        run.progress("lineage")
        pairs = {edge: streamed(pair, lineages()[edge]) for edge, pair in run.pairs.items()}
        run = replace(run, pairs=pairs)
    asked = run.asked
    found = explore(
        run.pairs, asked.task, asked.workload, policy, run.limits, run.progress, budget, aa
    )
    run = replace(run, asked=replace(asked, workload=found.workload))
    evidence = with_stale(run, lineages(), found.evidence)
    return _explained(run, lineages(), evidence, policy, stream), found.workload


def with_stale(run: Comparison, lineages: Lineages, evidence: Evidence) -> Evidence:
    """The evidence with every initializer that is not the checkpoint's tensor it should be."""
    return replace(evidence, faults=(*stale_tensors(lineages, run.pairs), *evidence.faults))


def _explained(
    run: Comparison, lineages: Lineages, evidence: Evidence, policy: Policy, stream: bool
) -> Evidence:
    """The evidence with where what fails comes from, before everything else."""
    findings = judge(evidence, policy).findings
    extra: list[Finding] = []
    if any(map(_can_be_localised, findings)):
        extra += introduced(evidence) if stream else _places(run, lineages, evidence)
    if not stream and any(finding.stage == "interaction" for finding in findings):
        trace = traced(run, lineages, evidence)
        evidence = replace(evidence, sites=trace.rows)
        extra += trace.findings()
        asked = run.asked
        extra += became_of_edit(
            run.pairs, asked.task, asked.workload, findings, run.limits, run.progress
        )
    return replace(evidence, faults=(*extra, *evidence.faults))


def _can_be_localised(finding: Finding) -> bool:
    """Errors of a size that noise is not; one told by its distribution alone is within it."""
    return finding.stage == "conversion" and finding.symptom != WRONG_SHAPE


def _places(run: Comparison, lineages: Lineages, evidence: Evidence) -> Iterator[Finding]:
    for edge, found in localized(run, lineages, evidence).items():
        yield from found.findings(EDGES[edge][1])
