"""Text and Markdown, against golden files (rewrite them with `pytest --update-golden`)."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
from evidences import clean, conversion, edit_lost, report

from surgery.evidence import Evidence
from surgery.report import render
from surgery.report.markdown import escape
from surgery.report.text import Text, wanted_width, wants_color

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


NAMES = ("last_hidden_state", "present.11.decoder.value_of_a_layer_with_a_long_name")


@pytest.mark.parametrize("width", [20, 80, 100, 120, 160])
def test_no_name_is_broken_at_any_width(width: int) -> None:
    rows = tuple(conversion("C_o", output=name) for name in NAMES)
    lines = Text(width=width).render(report(replace(clean(), conversion=rows))).splitlines()
    table = lines[lines.index("Conversion") : lines.index("Interaction")]
    for name in NAMES:
        assert sum(name in line.split() for line in table) == 2  # among the numbers and the places
    assert "max/noise" in table[1] and "L2/noise" in table[1]


@pytest.mark.parametrize("made", MADE.values())
def test_a_report_fits_a_narrow_terminal(made: Callable[[], Evidence]) -> None:
    lines = Text(width=80).render(report(made())).splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if line.startswith("C_e    logits"))
    assert "410,000" in row or "1.4" in row


def test_only_what_is_asked_for_makes_the_text_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert wanted_width(io.StringIO()) == 120
    for columns, width in (("20", 80), ("99", 99), ("400", 160), ("junk", 120)):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((120, 24)))
        assert wanted_width(io.StringIO()) == width
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((90, 24)))
    assert wanted_width(Terminal()) == 90


def test_counts_of_any_size_are_shown() -> None:
    huge = replace(clean(), compared=10**350)
    assert f"{10**350:,} positions compared" in Text(width=999).render(report(huge))
    assert "1 position compared" in Text().render(report(replace(clean(), compared=1)))
