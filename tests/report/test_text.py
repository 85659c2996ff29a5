"""Text and Markdown, against golden files (rewrite them with `pytest --update-golden`)."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from evidences import clean, edit_lost, report

from surgery.report import render
from surgery.report.markdown import escape
from surgery.report.text import Text, wants_color

MADE = {"pass": clean, "fail": edit_lost}


@pytest.mark.parametrize("format", ["text", "md"])
@pytest.mark.parametrize("verdict", MADE)
def test_golden(golden: Callable[[str, str], None], format: str, verdict: str) -> None:
    golden(f"report-{verdict}.{format}", render(report(MADE[verdict]()), format))


def test_colour_only_when_asked() -> None:
    made = report(edit_lost())
    assert "\x1b" not in Text().render(made)
    coloured = Text(color=True).render(made)
    assert "\x1b[1;31mFAIL" in coloured
    assert "\x1b[31m" not in coloured


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_color(Terminal()) and not wants_color(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_color(Terminal())


def test_names_are_no_markdown() -> None:
    hostile = "a|b [x](http://e.org) <img> @you `c` *d* www.e.org &lt;"
    assert escape(hostile) == (
        "a\\|b \\[x\\](http&#58;//e.org) &lt;img&gt; &#64;you \\`c\\` \\*d\\* "
        "www&#46;e.org &amp;lt;"
    )


def test_a_markdown_table_has_one_line_for_each_row() -> None:
    lines = render(report(edit_lost()), "md").splitlines()
    findings = lines[lines.index("## Findings") + 2 :]
    rows = findings[: findings.index("")]
    assert {row.replace("\\|", "").count("|") for row in rows} == {7}
