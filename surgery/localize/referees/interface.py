"""What a referee is: somebody else who computes a graph's values from the same given ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from surgery.localize.boundaries import Boundary
from surgery.localize.runs import Arrays, Runs

Answers = dict[str, NDArray[Any] | str]
"""Values by site; in place of one that there is not, why."""


@dataclass(frozen=True)
class Case:
    """One conversion on one batch, with PyTorch's values at its boundaries.

    boundaries: those that can be compared, the task's output after them; expected: PyTorch's
    float32 values by site; given: those of them that are put in, by the graph's own names and
    shapes; forced: what ONNX Runtime, optimised as by default, makes of them, by those names.
    """

    runs: Runs
    boundaries: tuple[Boundary, ...]
    expected: Mapping[str, NDArray[Any]]
    given: Mapping[str, NDArray[Any]]
    forced: Arrays

    @property
    def given_sites(self) -> Arrays:
        """PyTorch's values at the boundaries that are given, by site."""
        sites = (b.site for b in self.boundaries if b.value in self.given)
        return {site: self.expected[site] for site in sites}

    def by_site(self, values: Mapping[str, NDArray[Any] | str]) -> Answers:
        """Values under the graph's names as values at boundaries."""
        return {b.site: values[b.value] for b in self.boundaries if b.value in values}


class Referee(ABC):
    """One way to compute the values at boundaries; nothing of it is kept between cases."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called in a result."""

    @abstractmethod
    def values(self, case: Case, wanted: Sequence[Boundary]) -> Answers:
        """At least the values at `wanted`, by site, each from what `case` gives before it, or why
        there is none.

        Raises `SurgeryError` where it cannot run; the message is told.
        """


@dataclass(frozen=True)
class Ruling:
    """How far a referee's value at a boundary is from PyTorch's, in units of the noise there.

    `ratio` is None where it gave none, and `why` says why: it is then neither right nor wrong.
    `asked` is false where that was not for want of a run.
    """

    referee: str
    ratio: float | None
    right: bool = False
    why: str = ""
    asked: bool = True

    @property
    def wrong(self) -> bool:
        return self.ratio is not None and not self.right

    def __str__(self) -> str:
        said = "gave nothing" if self.ratio is None else f"{self.ratio:.3g}"
        return f"{self.referee} {said}"
