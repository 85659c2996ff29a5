"""ONNX Runtime, with its optimisations up to a level, on one execution provider."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.localize.boundaries import Boundary
from surgery.localize.referees.interface import Answers, Case, Referee


@dataclass(frozen=True)
class Session(Referee):
    """`level`: `disabled`, `basic`, `extended` or `all`; no `provider` is the CPU's.

    All boundaries are outputs of the graph, as in the run that found the error: that keeps ONNX
    Runtime from fusing across them at every level alike.
    """

    level: str
    provider: str = ""

    @property
    def name(self) -> str:
        where = f" on {self.provider}" if self.provider else ""
        return f"onnxruntime {self.level}{where}"

    def values(self, case: Case, wanted: Sequence[Boundary]) -> Answers:
        if self.level == "all" and not self.provider:
            return case.by_site(case.forced)  # the run that found the error
        names = [boundary.value for boundary in case.boundaries]
        found = case.runs.onnx(names, case.given, level=self.level, provider=self.provider)
        return case.by_site(found)
