"""The versioned report and the formats it can be read in."""

from __future__ import annotations

from surgery.registry import Registry
from surgery.report.interface import Renderer
from surgery.report.model import Report, load_report, report_schema

RENDERERS: Registry[type[Renderer]] = Registry(
    "report format",
    {
        "text": "surgery.report.text:Text",
        "json": "surgery.report.json_:Json",
        "md": "surgery.report.markdown:Markdown",
        "html": "surgery.report.html:Html",
    },
)


def render(report: Report, format: str) -> str:
    """`report` in one of `RENDERERS`; `KeyError` names the formats there are."""
    return RENDERERS[format]().render(report)


__all__ = ["RENDERERS", "Renderer", "Report", "load_report", "render", "report_schema"]
