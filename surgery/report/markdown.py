"""GitHub-flavoured Markdown, for pull requests and release notes."""

from __future__ import annotations

import re

from surgery.report.cells import Table
from surgery.report.model import Report
from surgery.report.tables import headline, subline, tables


class Markdown:
    """Headline and pipe tables; no name in a cell can be markup, a link or a mention."""

    def render(self, report: Report) -> str:
        parts = [f"# {headline(report)}", escape(subline(report)), *map(_table, tables(report))]
        return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """`text` so that it reads the same in Markdown.

    HTML and table syntax become entities; other punctuation is escaped where it could begin
    something. An autolink or a mention needs its `://`, `www.` or `@` whole.
    """
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]{}|#~!$])", r"\\\1", text)
    return text.replace("@", "&#64;").replace("://", "&#58;//").replace("www.", "www&#46;")


def _table(table: Table) -> str:
    marks = ["---:" if column in table.numeric else "---" for column in range(len(table.headers))]
    rows = [map(escape, table.headers), marks, *(map(escape, row) for row in table.rows)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return f"## {table.title}\n\n" + "\n".join(lines)
