"""A flip is a near-tie where rounding alone can turn it in both runs, and real otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from surgery.metrics.divergence import top1_flips
from surgery.metrics.flips import NOISE_UNITS, position_noise, reach, split_flips

Array = np.ndarray
SINGLE = ("float32", "float32")
logits = arrays(np.float32, (5, 4), elements=st.floats(-50, 50, width=32))
noises = st.floats(0, 10)


def split(
    p: list[float], q: list[float], noise: tuple[float, float], dtypes: tuple[str, str] = SINGLE
) -> tuple[bool, bool]:
    flipped, near = split_flips(np.array([p]), np.array([q]), dtypes, noise)
    return bool(flipped[0]), bool(near[0])


def test_the_grid_is_the_distance_between_numbers_of_the_dtype() -> None:
    sizes = np.array([1.0, 3.0, 16.0, -16.0])
    single = [2.0**-23, 2.0**-22, 2.0**-19, 2.0**-19]
    assert reach(sizes, "float32", 0.0).tolist() == single
    assert reach(sizes, "float16", 0.0).tolist() == [x * 2**13 for x in single]
    assert reach(sizes, "unknown", 0.0).tolist() == single, "the finer grid: fewer near-ties"
    assert reach(sizes, "float32", 0.5).tolist() == [x + NOISE_UNITS * 0.5 for x in single]


@pytest.mark.parametrize(
    ("p", "q", "noise", "near"),
    [
        # 16 and the float32 number after it: one grid step apart in each.
        ([16.0, 16.0 - 2**-20], [16.0 - 2**-20, 16.0], (0.0, 0.0), True),
        ([16.0, 15.9], [15.9, 16.0], (0.0, 0.0), False),
        ([16.0, 15.9], [15.9, 16.0], (0.0125, 0.0125), True),
        # One run breaks the tie clearly: the flip is real, whichever run it is.
        ([16.0, 15.9], [10.0, 16.0], (0.0125, 0.0125), False),
        ([16.0, 10.0], [15.9, 16.0], (0.0125, 0.0125), False),
        # Noise of one run excuses nothing in the other.
        ([16.0, 15.9], [15.9, 16.0], (0.0125, 0.0), False),
        ([16.0, 15.9], [15.9, 16.0], (0.0, 0.0125), False),
    ],
)
def test_a_flip_is_near_where_both_gaps_are_within_rounding(
    p: list[float], q: list[float], noise: tuple[float, float], near: bool
) -> None:
    assert split(p, q, noise) == (True, near)


def test_the_grid_is_that_of_each_runs_own_dtype() -> None:
    p, q = [16.0, 15.995], [15.995, 16.0]
    assert split(p, q, (0.0, 0.0), ("float16", "float16")) == (True, True)
    assert split(p, q, (0.0, 0.0), ("float32", "float16")) == (True, False)
    assert split(p, q, (0.0, 0.0), ("float16", "float32")) == (True, False)


@given(logits, logits, noises, noises)
def test_the_split_adds_up_and_is_symmetric(p: Array, q: Array, a: float, b: float) -> None:
    flipped, near = split_flips(p, q, SINGLE, (a, b))
    assert flipped.sum() == top1_flips(p, q)
    assert not (near & ~flipped).any()
    back = split_flips(q, p, SINGLE, (b, a))
    assert (back[0] == flipped).all() and (back[1] == near).all()


@given(logits, logits, noises, noises, noises)
def test_more_noise_never_makes_a_near_tie_real(
    p: Array, q: Array, a: float, b: float, more: float
) -> None:
    _, near = split_flips(p, q, SINGLE, (a, b))
    _, nearer = split_flips(p, q, SINGLE, (a + more, b + more))
    assert not (near & ~nearer).any()


@given(logits, noises)
def test_nothing_flips_between_a_run_and_itself(p: Array, noise: float) -> None:
    flipped, near = split_flips(p, p, SINGLE, (noise, noise))
    assert not flipped.any() and not near.any()


def test_what_cannot_be_compared_is_real() -> None:
    assert split([1.0, 0.0], [np.nan, 0.0], (10.0, 10.0)) in ((True, False), (False, False))
    assert split([0.0, 1.0], [np.nan, 0.0], (10.0, 10.0)) == (True, False)
    assert split([1.0, 0.9], [0.9, 1.0], (np.nan, 10.0)) == (True, False)


def test_noise_is_the_root_mean_square_over_the_vocabulary() -> None:
    found = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    assert position_noise(found, found + np.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == [
        np.sqrt(12.5),
        0.0,
    ]


def test_correct_runs_flip_at_near_ties_only() -> None:
    """Two float32 sums of one product in another order: flips that rounding makes are all near."""
    generator = np.random.default_rng(1)
    weights = generator.normal(size=(64, 50)).astype(np.float32)
    weights[:, 0] *= 3
    # Inputs come in equal pairs and token 1 has token 0's weights with each pair turned round, so
    # that only rounding tells the two apart.
    weights[:, 1] = weights[:, 0].reshape(32, 2)[:, ::-1].ravel()
    inputs = generator.normal(size=(2000, 32)).astype(np.float32).repeat(2, axis=1)
    exact = inputs.astype(np.float64) @ weights
    p = np.zeros((2000, 50), np.float32)
    q = p.copy()
    for i in range(64):
        p += np.outer(inputs[:, i], weights[i])
        q += np.outer(inputs[:, 63 - i], weights[63 - i])
    noise = position_noise(p, exact)
    flipped, near = split_flips(p, q, SINGLE, (noise, noise))
    assert flipped.sum() > 20
    assert (near == flipped).all()
