"""Two responses part at the first token that is not the other's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.metrics.parting import parting

tokens = st.lists(st.integers(0, 3), max_size=6)


@pytest.mark.parametrize(
    ("a", "b", "position"),
    [
        ((), (), None),
        ((1, 2), (1, 2), None),
        ((1, 2, 3), (1, 4, 3), 1),
        ((5,), (6,), 0),
        ((1, 2), (1, 2, 9), 2),
        ((), (1,), 0),
    ],
)
def test_by_hand(a: tuple[int, ...], b: tuple[int, ...], position: int | None) -> None:
    assert parting(a, b) == position


@given(tokens, tokens)
def test_up_to_there_they_are_the_same_and_there_they_are_not(a: list[int], b: list[int]) -> None:
    position = parting(a, b)
    assert position == parting(b, a)
    if position is None:
        assert a == b
    else:
        assert a[:position] == b[:position]
        assert a[position : position + 1] != b[position : position + 1]
