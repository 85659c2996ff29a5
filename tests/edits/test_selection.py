"""Heads and neurons from the recipe or from the best rows of a CSV."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from surgery.addresses import Head, Neuron, parse_head, parse_neuron
from surgery.edits.selection import select
from surgery.errors import CheckpointError, RecipeError


class Folder:
    """The files of a recipe, all in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, relative: str) -> Path:
        return self.root / relative


def heads(folder: Path, text: str | bytes, top: int | None = None) -> tuple[Head, ...]:
    (folder / "h.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return select(("layer", "head"), None, "h.csv", top, Folder(folder), parse_head, Head)


def written(addresses: list[str] | None, **given: Any) -> tuple[Head, ...]:
    return select(
        ("layer", "head"), addresses, given.get("file"), given.get("top"), None, parse_head, Head
    )


def test_a_list_is_taken_as_written() -> None:
    assert written(["L2H1", "L0H3"]) == (Head(2, 1), Head(0, 3))


def test_a_csv_is_taken_whole_without_top(tmp_path: Path) -> None:
    assert heads(tmp_path, "layer,head\n1,2\n0,3\n") == (Head(1, 2), Head(0, 3))


def test_top_takes_the_highest_scores(tmp_path: Path) -> None:
    text = "layer,head,score\n0,0,-5\n0,1,2.5\n0,2,1e3\n0,3,.5\n"
    assert heads(tmp_path, text, 2) == (Head(0, 2), Head(0, 1))
    assert heads(tmp_path, text, 99)[-1] == Head(0, 0)


def test_ties_keep_the_order_of_the_file(tmp_path: Path) -> None:
    text = "head,note,score,layer\n3,a,1,0\n1,b,2,0\n2,c,1,0\n0,d,1,0\n"
    assert heads(tmp_path, text, 3) == (Head(0, 1), Head(0, 3), Head(0, 2))


def test_without_scores_top_takes_the_first_rows(tmp_path: Path) -> None:
    assert heads(tmp_path, "layer,head\n1,2\n0,3\n", 1) == (Head(1, 2),)


@pytest.mark.parametrize(
    "text",
    [
        "", "layer,head\n", "layer,neuron\n0,1\n", "0,1\n0,2\n", "layer;head\n0;1\n",
        "layer,head\n0\n", "layer,head\nx,1\n", "layer,head\n1.0,1\n", "layer,head\n-1,1\n",
        "layer,head\n0,-1\n", "layer,head,score\n0,1,nan\n", "layer,head,score\n0,1,inf\n",
        "layer,head,score\n0,1,x\n", 'layer,head\n0,"1\n', "layer,head\n0,1\n0,1\n",
        b"layer,head\n0,\xff\n", b"\x00\x01", "layer,head\n\n", "layer,head\n0," + "9" * 5000,
        "layer,head\n0,1,2,3\n", "layer,layer,head\n0,1,2\n", "layer,head\n0," + "x" * 200_000,
    ],
)  # fmt: skip
def test_a_malformed_csv_is_refused_in_one_line(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, CheckpointError)) as caught:
        heads(tmp_path, text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("addresses", "given", "said"),
    [
        (None, {}, "give either heads or file"),
        (["L0H0"], {"file": "h.csv"}, "give either heads or file"),
        (["L0H0"], {"top": 1}, "top goes with file"),
        ([], {}, "no head is selected"),
        (["L0H0", "L1H0", "L0H0"], {}, "L0H0 is named twice"),
        (["L00H0", "L0H0"], {}, "named twice"),
        (["H0"], {}, "not a head address: 'H0'; expected one like L9H6"),
    ],
)
def test_a_selection_that_means_nothing_is_refused(
    addresses: list[str] | None, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        written(addresses, **given)


def test_a_hundred_thousand_neurons_take_a_second_not_an_hour() -> None:
    addresses = [f"L{i % 7}N{i}" for i in range(100_000)]
    start = time.monotonic()
    assert (
        len(select(("layer", "neuron"), addresses, None, None, None, parse_neuron, Neuron))
        == 100_000
    )
    assert time.monotonic() - start < 5
