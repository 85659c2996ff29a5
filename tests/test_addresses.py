"""Addresses and regions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.addresses import Head, Neuron, Region, parse_head, parse_layers, parse_neuron
from surgery.errors import RecipeError

INDEX = st.integers(0, 999_999)


@given(layer=INDEX, index=INDEX, expert=st.none() | INDEX)
def test_an_address_is_what_it_prints(layer: int, index: int, expert: int | None) -> None:
    head, neuron = Head(layer, index), Neuron(layer, index, expert)
    assert parse_head(str(head)) == head
    assert parse_neuron(str(neuron)) == neuron


@pytest.mark.parametrize(
    "text",
    ["", "L1", "H1", "L1N2", "l1h2", "L1H2 ", "L-1H2", "L1H", "L1.5H2", "L1H2\n", "L9999999H1"],
)
def test_what_is_no_head_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(RecipeError, match="expected one like L9H6") as caught:
        parse_head(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text",
    ["", "L1", "L1H2", "L3E5", "E5N1", "L3N5E17", "L3EN17", "N1L1", "L1N9999999999"],
)
def test_what_is_no_neuron_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="expected one like L12N77"):
        parse_neuron(text)


@pytest.mark.parametrize(
    ("written", "layers"),
    [("all", (0, 1, 2, 3)), ([2, 0], (0, 2)), ("1-3", (1, 2, 3)), ("2", (2,)), ("1-1", (1,))],
)
def test_a_layer_set(written: str | list[int], layers: tuple[int, ...]) -> None:
    assert parse_layers(written, 4) == layers


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("4", "has layers 0 to 3"), ("2-4", "has layers 0 to 3"), ([9], "has layers 0 to 3"),
        ("0-999999", "has layers 0 to 3"), ([], "at least one layer"), ("3-1", "at least one"),
        ([1, 1], "name each layer once"), ("", "expected all"), ("1,2", "expected all"),
        ("-1", "expected all"), ([-1], "has layers 0 to 3"), ("ALL", "expected all"),
    ],
)  # fmt: skip
def test_a_layer_set_outside_the_model_names_the_range(written: str | list[int], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_layers(written, 4)


@st.composite
def regions(draw: st.DrawFn) -> Region:
    spans = [sorted(draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))) for _ in range(2)]
    return Region("t", tuple(a for a, _ in spans), tuple(b for _, b in spans))


@given(a=regions(), b=regions())
def test_regions_overlap_when_they_share_an_element(a: Region, b: Region) -> None:
    count = np.zeros((5, 5), int)
    count[a.slices] += 1
    count[b.slices] += 1
    assert a.overlaps(b) == b.overlaps(a) == bool((count == 2).any())
    assert a.size == int(np.ones((5, 5))[a.slices].sum())


def test_regions_of_different_tensors_never_overlap() -> None:
    assert not Region("a", (0,), (1,)).overlaps(Region("b", (0,), (1,)))
