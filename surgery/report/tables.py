"""A report as headline and tables of short strings: what every renderer shows.

Every string that leaves here is printable: names come from untrusted files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from surgery.evidence import (
    CORNERS,
    Conversion,
    Effect,
    Finding,
    LayerError,
    SiteInteraction,
)
from surgery.report.behaviour import behaviour_tables
from surgery.report.cells import ABSENT, Table, changed, number, percent, signed
from surgery.report.cells import make_table as _table
from surgery.report.model import Report
from surgery.report.noise_tables import noise_tables
from surgery.taxonomy import Issue

RUNTIMES = {"T": "PyTorch", "R": "ONNX Runtime"}
HEADLINES = {"pass": "PASS", "fail": "FAIL", "not_evaluated": "NOT EVALUATED"}


def headline(report: Report) -> str:
    """The verdict in a few words: `FAIL: 2 findings`."""
    count = len(report.findings)
    if report.verdict == "pass":
        judged = "edit and conversion are" if "R_e" in report.corners else "the conversion is"
        return f"PASS: {judged} within the policy"
    if report.verdict == "not_evaluated":
        return "NOT EVALUATED: nothing was compared"
    return f"FAIL: {count} finding{'s' * (count != 1)}"


def subline(report: Report) -> str:
    """What the verdict rests on."""
    ran = [name for name in CORNERS if name in report.corners]
    rows = f"{report.covered_rows:,} embedding rows covered"
    positions = f"{report.compared:,} position{'s' * (report.compared != 1)} compared"
    return f"{positions} at {', '.join(ran) or 'no corner'}; {rows}"


def tables(report: Report) -> list[Table]:
    """Every table that has rows, the verdict's reasons first."""
    made = (
        _findings(report.findings),
        _issues(report.issues),
        _effects(report.effects),
        _drift(report),
        _conversion(report.conversion),
        _worst(report.conversion),
        *noise_tables(report.shapes, report.tolerances, report.repeats),
        _interaction(report),
        _layers(report.layers),
        stimuli_table(report),
        sites_table(report.sites),
        *behaviour_tables(report),
        _left_out(report),
        _corners(report),
        _policy(report),
        _inputs(report),
        _table("Environment", ("name", "value"), report.environment.items()),
    )
    return [table for table in made if table.rows]


def _findings(findings: Iterable[Finding]) -> Table:
    headers = ("stage", "symptom", "site", "value", "limit", "message")
    rows = (
        (f.stage, f.symptom, f.site, number(f.value), number(f.limit), f.message) for f in findings
    )
    return _table("Findings", headers, rows, 3, 4, spare=("limit", "value", "site"))


def _issues(issues: Iterable[Issue]) -> Table:
    headers = ("fingerprint", "stage", "symptom", "cause", "findings", "sites", "operator")
    own = attrgetter(*headers[:4])
    rows = ((*own(i), number(i.count), ", ".join(i.sites), i.operator) for i in issues)
    return _table("Issues", headers, rows, 4, spare=("operator", "findings", "sites"))


def _effects(effects: Iterable[Effect]) -> Table:
    headers = ("metric", "set", "n", *CORNERS, "Δ PyTorch", "Δ ONNX", "unit")
    rows = (
        (
            e.metric,
            e.stimulus_set,
            number(e.count),
            *(number(e.corners.get(corner)) for corner in CORNERS),
            *(change(e, runtime) for runtime in RUNTIMES),
            f"{e.unit} ({e.method})" if e.method else e.unit,
        )
        for e in effects
    )
    return _table("Behaviour", headers, rows, 2, 3, 4, 5, 6, 7, 8, spare=("unit", "n"))


def change(effect: Effect, runtime: str) -> str:
    """Edited minus original in one runtime; `–` where one of the two did not run."""
    ran = {f"{runtime}_o", f"{runtime}_e"} <= effect.corners.keys()
    spell = changed if effect.relative else signed
    return spell(effect.change(runtime)) if ran else ABSENT


def _drift(report: Report) -> Table:
    headers = ("set", "runtime", "positions", "KL, nats/token", "top-1 flips")
    rows = (
        (
            d.stimulus_set,
            RUNTIMES.get(d.runtime, d.runtime),
            number(d.positions),
            number(d.kl),
            percent(d.flip_rate),
        )
        for d in report.drift
    )
    return _table("Drift", headers, rows, 2, 3, 4)


def _conversion(conversion: Iterable[Conversion]) -> Table:
    headers = (
        "edge",
        "output",
        "positions",
        "max abs",
        "noise max",
        "max/noise",
        "L2/noise",
        "1 position",
        "cosine",
        "KL",
        "flips",
    )
    rows = (
        (
            c.edge,
            c.output,
            number(c.positions),
            number(c.max_abs),
            number(c.noise_max),
            number(c.ratio_max),
            number(c.ratio_l2),
            number(c.ratio_position),
            f"{c.cosine:.6f}" if math.isfinite(c.cosine) else number(c.cosine),
            number(c.kl),
            number(c.flips),
        )
        for c in conversion
    )
    spare = ("noise max", "cosine", "max abs", "KL", "flips", "positions")
    numeric = (2, 3, 4, 5, 6, 7, 8, 9, 10)
    return _table("Conversion", headers, rows, *numeric, spare=spare, names=("edge", "output"))


def _worst(conversion: Iterable[Conversion]) -> Table:
    """Where each output is farthest off: words, which would crowd the numbers out."""
    rows = ((c.edge, c.output, c.worst) for c in conversion)
    headers = ("edge", "output", "worst at")
    return _table("Worst positions", headers, rows, names=("edge", "output"))


def _interaction(report: Report) -> Table:
    headers = ("set", "output", "‖E‖", "‖I‖", "‖I‖/‖E‖", "ρ", "noise", "‖I‖/noise")
    rows = (
        (
            i.stimulus_set,
            i.output,
            *map(number, (i.effect, i.norm, i.ratio)),
            signed(i.rho),
            number(i.noise),
            number(i.noise_ratio),
        )
        for i in report.interaction
    )
    spare, names = ("noise", "‖E‖", "‖I‖"), ("set", "output")
    return _table("Interaction", headers, rows, 2, 3, 4, 5, 6, 7, spare=spare, names=names)


def _layers(layers: Iterable[LayerError]) -> Table:
    """Errors of the parts of a streamed model, in units of the noise."""
    headers = ("edge", "from", "to", "noise", "introduced/noise", "propagated/noise")
    rows = (
        (e.edge, e.begin, e.end, *map(number, (e.noise, e.introduced, e.propagated)))
        for e in layers
    )
    return _table("Layers", headers, rows, 3, 4, 5, spare=("noise",), names=("edge", "from", "to"))


MOST_STIMULI = 10
MOST_SITES = 60
STREAM = "stream before "


def stimuli_table(report: Report) -> Table:
    """The stimuli whose interaction is beyond noise, the worst first."""
    headers = ("set", "stimulus", "‖E‖", "‖I‖/‖E‖", "ρ", "‖I‖/noise")
    limit = report.policy.interaction.max_noise_ratio
    beyond = [row for row in report.stimuli if not row.noise_ratio <= limit]
    worst = sorted(beyond, key=lambda row: row.noise_ratio, reverse=True)[:MOST_STIMULI]
    rows = (
        (
            row.stimulus_set,
            row.stimulus,
            *map(number, (row.effect, row.ratio)),
            signed(row.rho),
            number(row.noise_ratio),
        )
        for row in worst
    )
    return _table("Interaction by stimulus", headers, rows, 2, 3, 4, 5, spare=("‖E‖",))


def sites_table(sites: Iterable[SiteInteraction]) -> Table:
    """The residual stream, every module that the edit acts in, and whatever is wrong.

    ‖E‖, ‖I‖/‖E‖ and ρ are of the runs as they are, those with "own" of the one module.
    """
    headers = ("layer", "site", "‖E‖", "‖I‖/‖E‖", "ρ", "own ‖E‖", "own ‖I‖/‖E‖", "own ρ", "edit")
    shown = [row for row in sites if row.wrong or row.word or row.site.startswith(STREAM)]
    shown.sort(key=lambda row: not row.wrong)
    kept = {row.site for row in shown[:MOST_SITES]}
    rows = (_site_cells(row) for row in sites if row.site in kept)
    numeric, names = (2, 3, 4, 5, 6, 7), ("site",)
    spare = ("own ‖E‖", "‖E‖")
    return _table("Interaction by layer", headers, rows, *numeric, spare=spare, names=names)


def _site_cells(row: SiteInteraction) -> tuple[str, ...]:
    """No word and no share where the module itself does nothing beyond noise."""
    acts = bool(row.word)
    return (
        "" if row.layer is None else str(row.layer),
        row.site,
        *map(number, (row.effect, row.ratio)),
        signed(row.rho),
        number(row.own_effect if acts else None),
        number(row.own_ratio if acts else None),
        signed(row.own_rho) if acts else number(None),
        row.word or ("differs" if row.wrong else ""),
    )


def _corners(report: Report) -> Table:
    headers = ("corner", "runtime", "model", "status", "seconds", "peak MiB", "batches")
    named = ((name, report.corners[name]) for name in CORNERS if name in report.corners)
    rows = (
        (
            name,
            c.runtime,
            c.model,
            c.status,
            number(c.seconds),
            number(mebibytes(c.peak_bytes)),
            number(c.batches),
        )
        for name, c in named
    )
    return _table("Corners", headers, rows, 4, 5, 6, spare=("batches", "peak MiB"))


def mebibytes(count: int) -> float:
    """`count` bytes; whole where there are many, which a float may be too small for."""
    return count >> 20 if count >= 1 << 53 else count / 2**20


def _policy(report: Report) -> Table:
    policy = report.policy
    rows = [
        (f"{section}.{name}", value if isinstance(value, str) else number(value))
        for section in ("conversion", "interaction", "preserve")
        for name, value in getattr(policy, section).model_dump().items()
    ]
    for rule in policy.target:
        for name in ("min_change", "max_change", "confidence"):
            if (value := getattr(rule, name)) is not None:
                rows.append((f"{rule.set} {rule.metric} {name}", signed(value)))
    return _table("Policy", ("limit", "value"), rows, 1)


def _left_out(report: Report) -> Table:
    """Batches that did not run, or not in full, and why."""
    said = report.inputs.get("workload", {}).get("left_out")
    rows = ((name, str(why)) for name, why in said.items()) if isinstance(said, dict) else ()
    return _table("Left out", ("batch", "why"), rows)


def _inputs(report: Report) -> Table:
    rows = (
        (name, key, value if isinstance(value, str) else _json(value))
        for name, entry in report.inputs.items()
        for key, value in entry.items()
    )
    return _table("Inputs", ("name", "what", "value"), rows)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
