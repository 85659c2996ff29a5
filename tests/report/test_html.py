"""The page: nothing in it runs or loads, and a browser shows what it says."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from evidences import clean, conversion_only, edit_lost, effect, report

from surgery.evidence import CORNERS, Evidence
from surgery.policy import BUILT_IN
from surgery.report import render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LOADS = {"script", "img", "image", "link", "iframe", "object", "embed", "video", "audio", "base"}


class Page(HTMLParser):
    """The page's tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_inert(page: Page) -> None:
    assert not page.tags & LOADS
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "xlink:href", "srcset", "action"}
    assert not [name for name in names if name.startswith("on")]
    assert not [value for _, value in page.attributes if "url(" in value]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert ("content", policy) in page.attributes


@pytest.mark.parametrize("evidence", [clean(), conversion_only(), edit_lost()])
def test_the_page_loads_and_runs_nothing(evidence: Evidence) -> None:
    text = render(report(evidence), "html")
    assert_inert(Page(text))
    assert "@import" not in text and "url(" not in text


def test_hostile_names_are_text() -> None:
    text = render(report(edit_lost()), "html")
    assert "<script" not in text and "<b>onnx" not in text
    assert "h.2.attn.c_proj.weight|<script>alert(1)</script>\\x1b[31m\\ud800" in Page(text).text


def test_the_picture_shows_what_failed() -> None:
    page = render(report(edit_lost()), "html")
    assert '<text x="78" y="211" class="pass">1.3× noise</text>' in page
    assert '<text x="642" y="211" class="fail">410,000× noise</text>' in page


def test_corners_that_did_not_run_are_shown_as_such() -> None:
    assert Page(render(report(conversion_only()), "html")).text.count("not run") == 2


def test_bars_of_shares_end_at_one_and_others_at_their_own_largest_value() -> None:
    rows = (
        effect("small", "target", 0.1, 0.2, 0.1, 0.25, unit="share of answers"),
        effect("large", "target", 1.0, 2.0, 1.0, 4.0, unit="logits"),
    )
    page = render(report(replace(clean(), effects=rows), BUILT_IN), "html")
    widths = re.findall(r"left:0.00%;width:([0-9.]+)%", page)
    assert widths == ["10.00", "20.00", "10.00", "25.00", "25.00", "50.00", "25.00", "100.00"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium binary")
@pytest.mark.parametrize(("made", "verdict"), [(clean, "PASS"), (edit_lost, "FAIL")])
def test_a_browser_shows_the_verdict(
    tmp_path: Path, made: Callable[[], Evidence], verdict: str
) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(report(made()), "html"), encoding="utf-8")
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        f"--user-data-dir={tmp_path / 'profile'} --window-size=1200,900 --enable-logging=stderr"
    ).split()
    command = [str(CHROMIUM), *options, "--dump-dom", path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    page = Page(shown.stdout)
    assert verdict in page.text
    assert all(name in page.text for name in CORNERS)
    assert_inert(page)
    # Chromium reports on its console whatever the page's policy kept it from loading.
    assert "Content Security Policy" not in shown.stderr and "CONSOLE" not in shown.stderr
