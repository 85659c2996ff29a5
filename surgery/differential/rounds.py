"""What runs when: a first look where the rest would take long, the rest, and what a budget adds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.differential.compare import compare
from surgery.differential.corners import Pair, Progress, Ran, run_corners
from surgery.differential.repeats import repeat
from surgery.differential.workload import Workload
from surgery.errors import StimuliError, quote
from surgery.evidence import Evidence, Finding
from surgery.export.tasks import Task
from surgery.gate import noise_dtype
from surgery.policy import CONVERSION_MAX_NOISE_RATIO, Policy
from surgery.registry import suggest
from surgery.runtimes.child import Limits, Outcome
from surgery.stimuli.afford import cost
from surgery.stimuli.extra import extra_batches, named

CERTAIN = 1000.0
"""How many times its limit an error must be for more batches to add nothing."""

FIRST_LOOK = 100
"""Positions of the largest probe of a first look: every padding, shape and short cache."""

REST_FLOPS = 2e12
"""Operations from which on the rest is worth loading each model twice: 40 s of float64."""

BUDGET = "time budget"
"""The name under which a report says that a budget added nothing."""


@dataclass(frozen=True)
class Explored:
    """The evidence, and the workload that gave it: what was added is in it, what was not run is
    in its `left_out`."""

    evidence: Evidence
    workload: Workload


def explore(
    pairs: Mapping[str, Pair],
    task: Task,
    workload: Workload,
    policy: Policy,
    limits: Limits,
    progress: Progress,
    budget: float | None = None,
    aa: bool = False,
) -> Explored:
    """As `measure`, in up to three rounds; the evidence is over all of them.

    Where the rest would take long, short probes come first. Once a fault is certain, only what
    the policy's rules need still runs. `budget`: seconds that all corners together may take; what
    the workload leaves of it goes to further probes, half of them like the worst batch so far.
    With `aa` each corner is then run against itself (`surgery.differential.repeats`).
    """
    with tempfile.TemporaryDirectory(prefix="surgery-diff-") as folder:
        scratch = Path(folder)
        look = first_look(workload)
        ran = run_corners(pairs, task, look or workload, scratch, limits, progress)
        if look:
            why = certain(compare(ran, look, task), policy)
            workload = needed(workload, look, policy, why) if why else workload
            rest = _without(workload, look)
            if rest.batches or rest.generations or rest.answers:
                ran = run_corners(pairs, task, rest, scratch, limits, progress, ran)
        progress("comparison")
        evidence = compare(ran, workload, task)
        if budget is not None:
            own, why = further(ran, workload, evidence, policy, budget)
            if why:
                workload = _leaving_out(workload, {BUDGET: why})
            else:
                ran = run_corners(pairs, task, own, scratch, limits, progress, ran)
                workload = replace(workload, batches=(*workload.batches, *own.batches))
                evidence = compare(ran, workload, task)
        if aa:
            repeats, faults = repeat(ran, pairs, task, workload, scratch, limits, progress)
            evidence = replace(evidence, repeats=repeats, faults=(*evidence.faults, *faults))
        return Explored(_admit(evidence, workload), workload)


def _admit(evidence: Evidence, workload: Workload) -> Evidence:
    """What ran alone because somebody asked for it is no proof of the rest."""
    if not workload.alone:
        return evidence
    message = f"only batch {quote(workload.alone)} ran, as was asked; the others were not compared"
    fault = Finding("coverage", "not measured", workload.alone, message)
    return replace(evidence, faults=(*evidence.faults, fault))


def only(workload: Workload, name: str) -> Workload:
    """The batch of that name, or with a row of that name, alone, with the numbers it has among
    the others. Raises `StimuliError` if there is none."""
    known = {batch.name: batch for batch in workload.batches}
    owners = {row: batch for batch in workload.batches for row in batch.rows}
    found = known.get(name) or owners.get(name) or named(name, known, workload.space)
    if found is None:
        raise StimuliError(
            f"there is no batch {quote(name)}{suggest(name, known)}; a report names "
            "those that ran, among its inputs"
        )
    if found.name not in known:
        [found] = workload.keep([found])
    return replace(workload.batches_only((found,)), alone=found.name)


# ---------------------------------------------------------------------------------- first look


def first_look(workload: Workload) -> Workload | None:
    """The short probes alone, if the rest would take long."""
    short = [b for b in workload.batches if b.stimulus_set == "probe" and cost(b) <= FIRST_LOOK]
    rest = sum(map(cost, workload.batches)) - sum(map(cost, short)) + _generated(workload)
    if not short or 2 * workload.parameters * rest < REST_FLOPS:
        return None
    return workload.batches_only(tuple(short))


def _generated(workload: Workload) -> int:
    """Positions of answers, and of greedy responses, each of whose tokens runs its whole prefix
    again."""
    forced = sum(len(own.tokens.prompt) + len(own.tokens.following) for own in workload.answers)
    return forced + sum(
        request.max_new_tokens * (len(prompt) + request.max_new_tokens // 2)
        for request in workload.generations
        for prompt in request.prompts
    )


def certain(evidence: Evidence, policy: Policy) -> str:
    """Why the verdict is fail whatever else runs, beyond doubt; empty if it may not be."""
    for name, corner in evidence.corners.items():
        if corner.status != "ok":
            return f"{name} ended {corner.status}"
    for fault in evidence.faults:
        if fault.stage in ("run", "interface"):
            return fault.message
    limit = CERTAIN * max(policy.conversion.max_noise_ratio, CONVERSION_MAX_NOISE_RATIO)
    for row in evidence.conversion:
        worst = max(row.ratio_max, row.ratio_l2, row.ratio_position)
        if not worst <= limit:
            dtype = noise_dtype(row.edge, row.output, evidence)
            return f"{row.output} is {worst:.3g} times {dtype} noise away on {row.edge}"
    return ""


def needed(workload: Workload, look: Workload, policy: Policy, why: str) -> Workload:
    """`workload` with what ran in `look` and what rules of the policy judge; the rest is left out,
    since a fault is certain: `why`."""
    sets = {rule.set for rule in policy.target}
    if policy.preserve.max_kl is not None or policy.preserve.max_flip_rate is not None:
        sets.add("preserve")
    done = {batch.name for batch in look.batches}
    kept = [b for b in workload.batches if b.name in done or b.stimulus_set in sets]
    ids = {stimulus.id for stimulus in workload.stimuli if stimulus.set in sets}
    asked = [
        (request, own)
        for request, own in zip(workload.generations, workload.responders, strict=True)
        if ids.intersection(own)
    ]
    names = {batch.name for batch in kept}
    skipped = {
        b.name: f"a fault is certain: {why}" for b in workload.batches if b.name not in names
    }
    return _leaving_out(
        replace(
            workload,
            batches=tuple(kept),
            measures=tuple(m for m in workload.measures if m.stimulus_set in sets),
            generations=tuple(request for request, _ in asked),
            responders=tuple(own for _, own in asked),
            answers=tuple(own for own in workload.answers if own.stimulus in ids),
        ),
        skipped,
    )


def _without(workload: Workload, done: Workload | None) -> Workload:
    names = {batch.name for batch in done.batches} if done else set()
    rest = tuple(batch for batch in workload.batches if batch.name not in names)
    return replace(workload, batches=rest)


def _leaving_out(workload: Workload, why: Mapping[str, str]) -> Workload:
    return replace(workload, left_out={**workload.left_out, **why})


# -------------------------------------------------------------------------------------- budget


def further(
    ran: Ran, workload: Workload, evidence: Evidence, policy: Policy, budget: float
) -> tuple[Workload, str]:
    """The probes that the time left allows, as a workload of their own, or why there are none."""
    none = workload.batches_only(())
    why = certain(evidence, policy)
    if why:
        return none, f"a fault is certain: {why}"
    outcomes = [*ran.corners.values(), *ran.references.values(), *ran.narrow.values()]
    spent = sum(outcome.seconds for outcome in outcomes)
    room = affordable(outcomes, sum(map(cost, workload.batches)), budget - spent)
    worst = max(evidence.conversion, key=lambda row: row.ratio_position).worst.rpartition(" @ ")[0]
    like = next(batch for batch in workload.batches if worst in batch.rows)
    extra = extra_batches(like, workload.space, min(room, workload.most_positions))
    found = workload.keep(list(extra))
    told = f"the corners took {spent:.3g} s of {budget:g} s: no time for another round"
    return replace(none, batches=tuple(found)), "" if found else told


def affordable(outcomes: Iterable[Outcome], positions: int, seconds: float) -> int:
    """Positions that another round can run in `seconds`: it starts and loads every model again,
    and is as quick for each position as the rounds so far, which ran `positions`."""
    starts = sum(outcome.seconds - outcome.busy for outcome in outcomes)
    busy = sum(outcome.busy for outcome in outcomes)
    return max(0, int((seconds - starts) / (busy / positions)))
