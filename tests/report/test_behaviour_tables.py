"""The tables and the picture of behaviour say what the evidence says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from behaviours import behaved, divergence
from evidences import clean, report

from surgery.evidence import Evidence
from surgery.policy import BUILT_IN
from surgery.report import render
from surgery.report.behaviour import TITLES, behaviour_tables
from surgery.report.klplot import LEFT, RIGHT, kl_plot
from surgery.report.tables import tables
from surgery.report.text import Text


def shown(evidence: Evidence, title: str) -> list[dict[str, str]]:
    [table] = [t for t in behaviour_tables(report(evidence)) if t.title == title]
    return [dict(zip(table.headers, row, strict=True)) for row in table.rows]


def test_every_table_is_in_every_format_and_none_where_nothing_was_measured() -> None:
    for format in ("text", "md", "html"):
        page = render(report(behaved()), format)
        assert [title for title in TITLES if title not in page] == []
    assert not set(TITLES) & {table.title for table in tables(report(clean()))}
    assert kl_plot(report(clean())) is None


def test_a_brief_text_leaves_them_to_the_report() -> None:
    page = Text(brief=True).render(report(behaved()))
    assert not [title for title in TITLES if f"\n{title}\n" in page]


def test_the_cells_are_the_rows() -> None:
    [kl] = [r for r in shown(behaved(), "KL divergence") if (r["set"], r["pair"]) == PLACE]
    row = divergence("preserve", "T")
    assert kl["mean, nats"] == "0.003" and kl["max"] == f"{row.kl['max']:.3g}"
    assert kl["95% interval"] == "0.002 … 0.004"
    [flips] = [r for r in shown(behaved(), "Top-1 flips") if (r["set"], r["pair"]) == PLACE]
    assert (flips["same top-1"], flips["flips"], flips["near-ties"]) == ("98.00%", "2", "1")
    assert flips["95% interval"] == "1.00% … 3.00%"
    assert flips["real, 95% interval"] == "0.50% … 1.50%"
    [parts] = [r for r in shown(behaved(), "Greedy responses") if (r["set"], r["pair"]) == PLACE]
    assert (parts["never part"], parts["part"], parts["median token"]) == ("70.00%", "3", "2")
    [ppl] = [r for r in shown(behaved(), "Perplexity") if (r["set"], r["pair"]) == PLACE]
    expected = row.perplexity
    assert ppl["PPL before"] == f"{expected['before']:.3g} ± {expected['before_error']:.3g}"
    assert ppl["95% interval"] == "0.001 … 0.007"
    [delta] = [r for r in shown(behaved(), "Token probabilities") if (r["set"], r["pair"]) == PLACE]
    assert delta["RMS, %"] == f"{100 * row.delta_p['rms']:.3g}"
    changes = shown(behaved(), "Changes")
    assert {"metric": "memory_rate", "edit in": "PyTorch", "from": "+0.48"}.items() <= (
        changes[0].items()
    )


PLACE = ("preserve", "E/PyTorch")


def test_a_row_with_nothing_in_it_is_still_a_row() -> None:
    bare = divergence("probe", "C_o", positions=0, kl={}, tokens=0, perplexity={}, delta_p={})
    evidence = replace(clean(), divergence=(bare,))
    [row] = shown(evidence, "KL divergence")
    assert row["mean, nats"] == row["median"] == row["95% interval"] == "–"
    assert shown(evidence, "Perplexity") == []
    assert kl_plot(report(evidence)) is None


def test_lines_are_in_order_on_one_scale() -> None:
    plot = kl_plot(report(behaved()))
    assert plot is not None
    assert len(plot.lines) == 8
    for line in plot.lines:
        places = [line.x[name] for name in ("1%", "10%", "median", "90%", "99%", "max")]
        assert places == sorted(places)
        assert places[0] >= LEFT and places[-1] <= RIGHT
        assert places[0] <= line.mean <= places[-1]
    edges = [line.mean for line in plot.lines if line.kind == "edge"]
    edits = [line.mean for line in plot.lines if line.kind == "edit"]
    assert max(edges) < min(edits)


def test_the_limit_is_drawn_across_the_edits_it_bounds() -> None:
    plot, unlimited = kl_plot(report(behaved())), kl_plot(report(behaved(), BUILT_IN))
    assert plot is not None and plot.limit is not None
    assert unlimited is not None and unlimited.limit is None
    x, top, bottom = plot.limit
    crossed = [line.name for line in plot.lines if top < line.y < bottom]
    assert crossed == ["preserve · E/PyTorch", "preserve · E/ONNX"]
    assert x > max(line.mean for line in plot.lines if line.name in crossed), "0.01 > 0.003"


@pytest.mark.parametrize("size", [0.0, 1e-300, 1e5])
def test_divergences_of_any_size_can_be_drawn(size: float) -> None:
    row = divergence("target", "T")
    scaled = replace(row, kl={name: value * size for name, value in row.kl.items()})
    plot = kl_plot(report(replace(behaved(), divergence=(scaled,))))
    assert plot is not None
    places = [*plot.lines[0].x.values(), plot.lines[0].mean, *(x for x, _ in plot.ticks)]
    assert all(LEFT <= place <= RIGHT for place in places)
    assert 2 <= len(plot.ticks) <= 12


def test_what_is_not_a_number_is_not_drawn() -> None:
    row = divergence("target", "T")
    bad = replace(row, kl={**row.kl, "max": float("nan")})
    assert kl_plot(report(replace(behaved(), divergence=(bad,)))) is None
    assert "NaN" in render(report(replace(behaved(), divergence=(bad,))), "html")


def test_hostile_names_are_text_in_the_picture() -> None:
    row = replace(divergence("target", "T"), stimulus_set="<b>x</b>", pair="<script>")
    page = render(report(replace(behaved(), divergence=(row,))), "html")
    assert "<script" not in page and "<b>x" not in page
