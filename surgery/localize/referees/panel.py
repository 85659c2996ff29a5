"""All referees on one case, and what their rulings together say: the stage at fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from surgery.errors import SurgeryError
from surgery.localize.boundaries import Boundary
from surgery.localize.referees.exported import Exported
from surgery.localize.referees.interface import Answers, Case, Referee, Ruling
from surgery.localize.referees.reference import Reference
from surgery.localize.referees.session import Session

Ratio = Callable[[Boundary, NDArray[Any], NDArray[Any]], float]
"""The largest difference between two values at a boundary, in units of the noise there."""

EXPORTED, REFERENCE = Exported.name, Reference.name
PLAIN = Session("disabled").name
LEVELS = tuple(Session(level).name for level in ("basic", "extended", "all"))

CAPTURE, TRANSLATE, OPTIMISE, KERNEL = "capture", "translate", "optimise", "kernel"


@dataclass(frozen=True)
class Verdict:
    """The stage at fault and every ruling in the referees' order.

    `note`: what narrows the stage down, or what keeps it from being certain.
    """

    stage: str
    rulings: tuple[Ruling, ...]
    note: str = ""


class Panel:
    """The referees of one case; each runs once, when first asked."""

    def __init__(
        self,
        case: Case,
        members: Sequence[Referee],
        wanted: Sequence[Boundary],
        ratio: Ratio,
        limit: float,
    ) -> None:
        self._case, self._members, self._wanted = case, members, wanted
        self._ratio, self._limit = ratio, limit
        self._found: dict[str, Answers | str] = {}

    def judge(self, boundary: Boundary, explained: str = "") -> Verdict:
        """The stage at fault where a boundary is wrong; `explained`: why the capture, which is
        the dearest to ask, has no say in it."""
        plain = self._ruling(PLAIN, boundary)
        if not explained and plain.right:
            explained = "the graph itself is right"
        rulings = tuple(
            Ruling(EXPORTED, None, why=f"not asked: {explained}", asked=False)
            if member.name == EXPORTED and explained
            else self._ruling(member.name, boundary)
            for member in self._members
        )
        stage, note = name_stage(rulings, self._same_as_captured(boundary, rulings))
        return Verdict(stage, rulings, note)

    def _ruling(self, name: str, boundary: Boundary) -> Ruling:
        value = self._value(name, boundary)
        if isinstance(value, str):
            return Ruling(name, None, why=value)
        ratio = self._ratio(boundary, value, self._case.expected[boundary.site])
        return Ruling(name, ratio, ratio <= self._limit)

    def _value(self, name: str, boundary: Boundary) -> NDArray[Any] | str:
        """A referee's value at the boundary, or why it has none."""
        if name not in self._found:
            self._found[name] = self._run(name)
        values = self._found[name]
        if isinstance(values, str):
            return values
        return values.get(boundary.site, "has no such value")

    def _run(self, name: str) -> Answers | str:
        member = next(member for member in self._members if member.name == name)
        try:
            return member.values(self._case, self._wanted)
        except SurgeryError as error:
            return str(error)

    def _same_as_captured(self, boundary: Boundary, rulings: Sequence[Ruling]) -> bool:
        """Whether the graph, nothing optimised, gives the exported program's own value."""
        if not _of(EXPORTED, rulings).wrong:
            return False
        graph, captured = (self._value(name, boundary) for name in (PLAIN, EXPORTED))
        if isinstance(graph, str) or isinstance(captured, str):
            return False
        return self._ratio(boundary, graph, captured) <= self._limit


def name_stage(rulings: Sequence[Ruling], as_captured: bool) -> tuple[str, str]:
    """The first stage that is wrong, and a note. A referee without a ruling is never right.

    `as_captured`: the graph gives what the exported program gives. Only then is the capture at
    fault: a file of another exporter may come of another capture than ours.
    """
    exported, reference, plain = (_of(name, rulings) for name in (EXPORTED, REFERENCE, PLAIN))
    if exported.wrong and as_captured:
        return CAPTURE, ""
    if plain.right:
        wrong = [r.referee for r in rulings if r.referee in LEVELS and r.wrong]
        return OPTIMISE, f"wrong from {wrong[0]} on" if wrong else ""
    if reference.right:
        return KERNEL, ""
    return TRANSLATE, "; ".join(_open(exported, reference))


def _open(exported: Ruling, reference: Ruling) -> list[str]:
    """What keeps a graph from being certainly, or alone, at fault."""
    notes = []
    if exported.wrong:
        notes.append("our own capture of the model is wrong there too, in another way")
    for stage, ruling in ((CAPTURE, exported), (KERNEL, reference)):
        if ruling.ratio is None and ruling.asked:
            notes.append(f"{stage} is not ruled out, for {ruling}: {ruling.why}")
    return notes


def _of(name: str, rulings: Sequence[Ruling]) -> Ruling:
    none = Ruling(name, None, why="is not there")
    return next((ruling for ruling in rulings if ruling.referee == name), none)
