"""The campaign's outcomes as tables: docs/faults.md is written from these."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.localize.outcomes import CATCH, CLEAN, EDIT, NOT_MADE, Outcome, mutants

HEAD = f"""# Seeded faults

Faults planted in exports, each judged by `surgery diff` and localised. This file is written by
`make fault-campaign` (an hour and more on two cores; `python tools/seed_faults.py --resume` goes on
where a run was stopped, `--jobs N` takes N models at a time, `--model` and `--fault` only some).

*Effect*: the largest difference between the mutant's outputs and the clean export's, in units of
PyTorch's float32 noise, on every input of the oracle and on as many it never sees, among them each
token of the vocabulary. Faults above {CATCH:g} must be caught.
"""

WHY: dict[str, str] = {
    "positions one off": "rotary angles are relative: shifting all positions changes nothing",
    "positions count padding": "rotary angles are relative: padding shifts a row as a whole",
    "epsilon 10% larger": "epsilon is far below the variance that it is added to",
    "epsilon tenfold": "epsilon is far below the variance that it is added to",
    "rotary base": "a head of one frequency, which is 1 whatever the base",
    "scaled 0.2%": "a norm follows, which undoes any scale",
    "NaN under padding": "the numbers at real positions are right; those at padding are told",
}
"""Why a fault may have hardly any effect."""


def totals(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """What of the outcomes there is to count."""
    planted = mutants(outcomes)
    strong = [o for o in planted if o.strong]
    local = [o for o in strong if o.layer is not None]
    clean = [o for o in outcomes if o.kind == CLEAN]
    edits = [o for o in outcomes if o.kind == EDIT]
    return {
        "models": str(len({o.model for o in outcomes})),
        "kinds of faults": str(len({(o.kind, o.fault) for o in planted})),
        "mutants": str(len(planted)),
        f"above {CATCH:g} times the noise, caught": _share(strong, lambda o: o.caught),
        "at or below it": str(len(planted) - len(strong)),
        "localised: right layer": _share(local, lambda o: bool(o.layer)),
        "localised: right module": _share(local, lambda o: bool(o.module)),
        "localised: right operator, constant or tensor": _share(local, lambda o: bool(o.operator)),
        "localised: confirmed by a reset": _share(local, lambda o: bool(o.confirmed)),
        "wrong edits caught": _share(edits, lambda o: o.caught),
        "wrong edits named as such": _share(edits, lambda o: bool(o.as_such)),
        "clean variants": str(len(clean)),
        "false alarms": str(sum(o.caught for o in clean)),
    }


def _share(of: Sequence[Outcome], right: Callable[[Outcome], bool]) -> str:
    return f"{sum(map(right, of))} of {len(of)}"


def save(outcomes: Sequence[Outcome], folder: Path) -> str:
    """Writes `faults.json` and `faults.md`; the text of the latter."""
    found: dict[str, Any] = {"totals": totals(outcomes)}
    found["outcomes"] = [outcome.to_json() for outcome in outcomes]
    (folder / "faults.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = markdown(outcomes)
    (folder / "faults.md").write_text(text, encoding="utf-8")
    return text


def markdown(outcomes: Sequence[Outcome]) -> str:
    """All of docs/faults.md."""
    parts = [
        HEAD,
        "## Totals\n",
        table(("", ""), totals(outcomes).items()),
        "## By fault\n",
        "Over all models and depths; layer to reset are of what there was to localise.\n",
        table(
            ("fault", "mutants", "least effect", "caught", "layer", "module", "operator", "reset"),
            _rows(mutants(outcomes)),
        ),
        "## By model\n",
        table(
            ("model", "mutants", "above the bar", "caught", "clean", "alarms"), _models(outcomes)
        ),
        f"## At or below {CATCH:g} times the noise\n",
        "None of these has to be caught. *pass* is right where the numbers are; *fail* where "
        "lineage, the interface or a limit of 8 times the noise tells what is wrong.\n",
        table(("model", "fault", "depth", "effect", "verdict", "why"), _weak(mutants(outcomes))),
        *_exceptions(outcomes),
        "## Edited models\n",
        "What the file of the edited model holds, and whether lineage or the interaction says so "
        "in words.\n",
        table(("edit", "fault", "mutants", "caught", "named as such"), _edits(outcomes)),
        "## Clean variants\n",
        table(("variant", "models", "false alarms", "not made"), _clean(outcomes)),
    ]
    return "\n".join(parts)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    titles = list(head)
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _rows(planted: Sequence[Outcome]) -> Iterable[tuple[object, ...]]:
    for name, own in _groups(planted, lambda o: f"{o.kind}: {o.fault}").items():
        local = [o for o in own if o.layer is not None]
        marks = ("layer", "module", "operator", "confirmed")
        told = [f"{sum(bool(getattr(o, m)) for o in local)}/{len(local)}" for m in marks]
        caught = f"{sum(o.caught for o in own)}/{len(own)}"
        least = f"{min(o.effect for o in own):.3g}"
        yield name, len(own), least, caught, *(told if local else [""] * len(marks))


def _models(outcomes: Sequence[Outcome]) -> Iterable[tuple[object, ...]]:
    for name, own in _groups(outcomes, lambda o: o.model).items():
        planted, clean = mutants(own), [o for o in own if o.kind == CLEAN]
        strong = [o for o in planted if o.strong]
        caught, alarms = sum(o.caught for o in strong), sum(o.caught for o in clean)
        yield name, len(planted), len(strong), caught, len(clean), alarms


def _weak(planted: Sequence[Outcome]) -> Iterable[tuple[object, ...]]:
    for o in sorted((o for o in planted if not o.strong), key=lambda o: (o.fault, o.model)):
        yield o.model, o.fault, o.depth, f"{o.effect:.3g}", o.verdict, _why(o)


def _why(o: Outcome) -> str:
    if o.caught:
        return f"{', '.join(o.symptoms)}"
    if o.fault in WHY:
        return WHY[o.fault]
    size = "no number differs" if o.effect == 0 else "within the noise" if o.effect <= 1 else ""
    return size or "within 8 times the noise by each measure"


def _exceptions(outcomes: Sequence[Outcome]) -> list[str]:
    """Every outcome that is not as it should be, with what was said."""
    wrong = [o for o in outcomes if _is_wrong(o)]
    head = ("model", "fault", "depth", "effect", "verdict", "what was said")
    rows = ((o.model, o.fault, o.depth, f"{o.effect:.3g}", o.verdict, _plain(o)) for o in wrong)
    return ["## Not as it should be\n", table(head, rows) if wrong else "Nothing.\n"]


def _is_wrong(o: Outcome) -> bool:
    if o.kind in (CLEAN, NOT_MADE):
        return o.kind == CLEAN and o.verdict != "pass"
    marks = (o.layer, o.module, o.operator, o.confirmed) if o.strong else ()
    return (o.strong and not o.caught) or o.as_such is False or False in marks


def _plain(o: Outcome) -> str:
    text = (o.named or ", ".join(o.symptoms)).replace("|", "/").replace("\n", " ")
    return text if len(text) <= 240 else text[:239] + "…"


def _edits(outcomes: Sequence[Outcome]) -> Iterable[tuple[object, ...]]:
    own = [o for o in outcomes if o.kind == EDIT]
    for name, same in _groups(own, lambda o: o.fault).items():
        edit, _, fault = name.partition(": ")
        caught, named = sum(o.caught for o in same), sum(bool(o.as_such) for o in same)
        yield edit, fault, len(same), f"{caught}/{len(same)}", f"{named}/{len(same)}"


def _clean(outcomes: Sequence[Outcome]) -> Iterable[tuple[object, ...]]:
    own = [o for o in outcomes if o.kind in (CLEAN, NOT_MADE)]
    for name, same in _groups(own, lambda o: o.fault).items():
        kinds = Counter(o.kind for o in same)
        yield name, kinds[CLEAN], sum(o.caught for o in same), kinds[NOT_MADE]


def _groups(outcomes: Iterable[Outcome], key: Callable[[Outcome], str]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(key(outcome), []).append(outcome)
    return found
