"""What a renderer of reports is."""

from __future__ import annotations

from typing import Protocol

from surgery.report.model import Report


class Renderer(Protocol):
    """Turns a report into text; pure, and safe for names that come from untrusted files."""

    def render(self, report: Report) -> str: ...
