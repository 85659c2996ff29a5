"""`docs/coverage.md`, from the cases: what of which op is proven on which family, and why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from cases import CASES, HOOKS, Case
from exports import FAMILIES, PROVED, VARIANTS, verdict
from models import family_of

_TEXT = """# Coverage

**{proven} of {all} cells are proven**, {approximate} are approximate and {refused} refused;
none is left open. On variants {others_proven} cells more are proven.

This file is written from the cases that the tests run, by `pytest tests/contracts --update-golden`,
and a test fails where it is not what they give.

- *proven*: on a small random model of the family, logits of the edited weights before rounding are
  those of the live, unedited model with the edit as a hook, within 20 times the float32 noise; what
  is stored is those numbers, rounded once; and `verify` finds nothing. See [design.md](design.md).
- *approximate*: the same, but a norm follows what the edit changes, so that part of what was taken
  out of what is written can come back; it is refused without `approximate: true`.
- *refused*: planning fails, with an error that says what the number stands for. Where anything else
  has a number, that is refused on some layers or tensors, or asks for `approximate: true`.

## Families

{families}

## Where `steer_bias` can hold a vector

By the hook point of the autoencoder.

{hooks}

## Variants

Configs of a family whose tensors or blocks are others than its defaults give.

{others}

## Export

{exports}

- *linked* and *portable* are proven: logits, or the last hidden state, of ONNX Runtime are
  PyTorch's within 8 times the float32 noise, of weights stored in float32 and in bfloat16, on
  shapes unlike the traced one, one row, one token, padding on either side and between real tokens,
  and beside a row of nothing but padding.
- *with a cache*: the same in two parts over the cache, and 32 greedy tokens one at a time are those
  of transformers' `generate`, for prompts of unlike length in one batch.
- *float16*: the graph computes in float16, within 8 of its roundings.
- *stitched*: a graph of five layers made of two traced ones of each kind is the whole trace, to the
  byte.

## Why

Where something is refused, or gone round in an export, the family:

{reasons}
"""


@dataclass
class Notes:
    """Reasons, numbered in the order they are first given."""

    reasons: list[str] = field(default_factory=list)

    def number(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason) + 1


def coverage() -> str:
    """The whole file."""
    notes = Notes()
    tables = {
        "families": _table(CASES, FAMILIES, lambda case: case.way, notes),
        "hooks": _table(_steering(), FAMILIES, lambda case: f"`{_point(case)}`", notes),
        "others": _table(CASES, VARIANTS, lambda case: case.way, notes),
        "exports": _exports(notes),
    }
    words = Counter(word for model in FAMILIES for word in verdicts(model))
    return _TEXT.format(
        **tables,
        **words,
        all=words.total(),
        others_proven=sum(verdicts(model).count("proven") for model in VARIANTS),
        reasons="\n".join(f"{n}. {reason}" for n, reason in enumerate(notes.reasons, 1)),
    )


def verdicts(model: str) -> list[str]:
    """What is said of every way of every op on `model`."""
    ways = dict.fromkeys(case.way for case in CASES)
    return [_word([c for c in CASES if (c.way, c.model) == (way, model)]) for way in ways]


def _steering() -> list[Case]:
    return [case for case in CASES if case.edit.get("patch") == "steer_bias" and _point(case)]


def _point(case: Case) -> str:
    """The hook point without its block; nothing for one that no family steers at."""
    return next((hook for hook in HOOKS if case.hook.endswith(hook)), "")


def _table(
    cases: Iterable[Case], models: Sequence[str], row: Callable[[Case], str], notes: Notes
) -> str:
    cells: dict[str, dict[str, list[Case]]] = {}
    for case in cases:
        cells.setdefault(row(case), {}).setdefault(case.model, []).append(case)
    lines = ["| | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for name, by_model in cells.items():
        found = " | ".join(_cell(by_model[model], notes) for model in models)
        lines.append(f"| {name} | {found} |")
    return "\n".join(lines)


def _exports(notes: Notes) -> str:
    lines = ["| | " + " | ".join(FAMILIES) + " |", "|---" * (len(FAMILIES) + 1) + "|"]
    for column in PROVED:
        said = [verdict(column, family) for family in FAMILIES]
        cells = (f"{word} [{notes.number(why)}]" if why else word for word, why in said)
        lines.append(f"| {column} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(cases: Sequence[Case], notes: Notes) -> str:
    """That an autoencoder hooks elsewhere is no fault of a family that has what the edit needs."""
    word = _word(cases)
    refused = [case.refused for case in cases if case.refused]
    kept = [text for text in refused if word == "refused" or not text.startswith("hooks ")]
    numbers = sorted({notes.number(_reason(text, cases[0].model)) for text in kept})
    return " ".join([word, *(f"[{n}]" for n in numbers)])


def _word(cases: Sequence[Case]) -> str:
    meant = [case for case in cases if not case.refused]
    if not meant:
        return "refused"
    return "approximate" if all(case.edit.get("approximate") for case in meant) else "proven"


def _reason(refused: str, model: str) -> str:
    if refused.startswith("hooks "):
        return "has no such hook point, or no bias at it"
    return refused.removeprefix(f"{family_of(model)} ")
