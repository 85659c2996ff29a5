"""The report itself."""

from __future__ import annotations

from surgery.report.model import Report


class Json:
    """Reads back as the same report."""

    def render(self, report: Report) -> str:
        return report.dump()
