"""What a localisation found: every boundary, and what brings errors in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from surgery.errors import quote
from surgery.evidence import Finding
from surgery.localize.edit import EditTrace
from surgery.localize.referees import Ruling
from surgery.localize.trial import Operator

LIMIT = 8.0
"""Errors are told in units of noise; the built-in policy allows a conversion this many."""

_MEANING = {
    "capture": "the program that torch.export captures of the model gives that same wrong value",
    "translate": "the graph says something else than the model",
    "optimise": "ONNX Runtime gets it right with optimisations off",
    "kernel": "ONNX Runtime computes an operator otherwise than ONNX defines it",
}


@dataclass(frozen=True)
class Row:
    """One boundary: how far ONNX Runtime's value is from PyTorch's, in units of the noise there.

    `error`: in the run as it is; `introduced`: with PyTorch's values at all boundaries before it.
    `noise` is PyTorch in the type the graph computes in against float64, the largest difference;
    what is no number is off by infinity. `overlap` and `sigma_ratio` say how alike `error` and
    noise are distributed, as in `surgery.evidence.ErrorShape`; None where it was not compared.
    """

    site: str
    value: str
    noise: float
    error: float
    introduced: float
    overlap: float | None = None
    sigma_ratio: float | None = None

    @property
    def guilty(self) -> bool:
        return self.introduced > LIMIT


@dataclass(frozen=True)
class Fault:
    """A module that brings an error in.

    `also`: the other boundaries where the same cause does, in other layers mostly; `confirmed`:
    with PyTorch's values at all of these, or at all modules of their kind, nothing else is wrong;
    `stage` is `capture`, `translate`, `optimise` or `kernel`: what of the conversion is at fault;
    `operator` where it was found; `within`: modules that have no boundary of their own, experts,
    and lie before this one; `referees`: who else got this boundary right, in the order of the
    conversion; `note`: what narrows the stage down, or keeps it from being certain.
    """

    site: str
    introduced: float
    confirmed: bool
    stage: str
    operator: Operator | None
    also: tuple[str, ...] = ()
    within: tuple[str, ...] = ()
    referees: tuple[Ruling, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        where = f"{self.site} and {', '.join(self.also)}" if self.also else self.site
        inside = f" (within {', '.join(self.within)})" if self.within else ""
        node = f" at {self.operator}" if self.operator else ""
        sure = "is confirmed" if self.confirmed else "is not confirmed"
        meaning = "; ".join(filter(None, (_MEANING[self.stage], self.note)))
        return (
            f"the error comes in at {where}{inside}{node}, {self.introduced:.3g} times the noise "
            f"({meaning}); it {sure} by putting PyTorch's value there"
        )

    @property
    def ruled(self) -> str:
        """The referees that got it right and those that did not."""
        right = [ruling.referee for ruling in self.referees if ruling.right]
        wrong = [ruling.referee for ruling in self.referees if ruling.wrong]
        sides = (("right", right), ("wrong", wrong))
        return "; ".join(f"{word} in {', '.join(names)}" for word, names in sides if names)


@dataclass(frozen=True)
class Localization:
    """Every boundary in the order the graph computes them, and what brings errors in.

    `left_out`: boundaries that could not be compared, for their shape; `note`: why nothing more
    can be said, where that is so; `edit`: of an edited model, what becomes of the edit in each
    module, where that was asked for.
    """

    rows: tuple[Row, ...]
    faults: tuple[Fault, ...]
    batch: str
    left_out: tuple[str, ...] = ()
    note: str = ""
    edit: EditTrace | None = None

    @property
    def clean(self) -> bool:
        """Whether something was compared, no boundary is off by more than the limit and no module
        does with the edit what PyTorch does not."""
        right = all(row.error <= LIMIT for row in self.rows)
        survived = self.edit is None or self.edit.clean
        return bool(self.rows) and right and survived and not self.faults and not self.note

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def findings(self, corner: str) -> Iterator[Finding]:
        """The faults as findings about `corner`, R_o or R_e; where there is none, why."""
        for fault in self.faults:
            site = f"{corner}/{fault.site}"
            ruled = f"; {fault.ruled}" if fault.ruled else ""
            message = f"{corner}: {fault}, on {quote(self.batch)}{ruled}"
            kind, told = "introduced error", fault.operator.told if fault.operator else ""
            yield Finding(fault.stage, kind, site, message, fault.introduced, LIMIT, told)
        if self.note and not self.faults:
            message = f"{corner}: where the error comes in was not found: {self.note}"
            yield Finding("localize", "not found", corner, message)
