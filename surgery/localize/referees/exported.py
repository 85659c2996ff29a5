"""PyTorch with what torch.export captured of the model, by the exporter call of our capture."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.localize.boundaries import Boundary
from surgery.localize.referees.interface import Answers, Case, Referee


class Exported(Referee):
    name = "ExportedProgram"

    def values(self, case: Case, wanted: Sequence[Boundary]) -> Answers:
        inner = [boundary for boundary in case.boundaries if boundary.value in case.given]
        return dict(case.runs.exported(inner, case.given_sites))
