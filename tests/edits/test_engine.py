"""Rounding happens once; what no edit changes keeps its bits; no edit makes a NaN or infinity."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.addresses import Region
from surgery.edits.engine import round_once
from surgery.edits.scale import scale
from surgery.errors import EditError

DTYPES: dict[str, tuple[Any, Any, torch.dtype]] = {
    "F16": (np.float16, np.float32, torch.float16),
    "BF16": (ml_dtypes.bfloat16, np.float32, torch.bfloat16),
    "F32": (np.float32, np.float32, torch.float32),
    "F64": (np.float64, np.float64, torch.float64),
}
ROWS = Region("t", (0,), (1,))


def bits_of(dtype: Any) -> Any:
    return np.dtype(f"u{np.dtype(dtype).itemsize}")


@st.composite
def stored(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Any bits at all in any stored type: payloads of NaN, -0.0, subnormals."""
    dtype = draw(st.sampled_from([numpy for numpy, _, _ in DTYPES.values()]))
    top = np.iinfo(bits_of(dtype)).max
    special = st.sampled_from([0, top, top // 2, top // 2 + 1, 1])
    numbers = draw(st.lists(st.integers(0, top) | special, min_size=1, max_size=8))
    return np.array(numbers, bits_of(dtype)).view(dtype)


def widened(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with np.errstate(invalid="ignore"):
        return values.astype(np.float64 if values.dtype == np.float64 else np.float32)


def same_bits(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return a.tobytes() == b.tobytes() and a.dtype == b.dtype


@given(values=stored())
def test_a_factor_of_one_keeps_every_bit(values: np.ndarray[Any, Any]) -> None:
    with np.errstate(invalid="ignore"):
        assert same_bits(round_once(ROWS, values, scale(widened(values), 1.0)), values)


@given(values=stored(), factor=st.sampled_from([0.0, -0.0]))
def test_a_factor_of_zero_writes_positive_zero(values: np.ndarray[Any, Any], factor: float) -> None:
    with np.errstate(invalid="ignore"):
        assert round_once(ROWS, values, scale(widened(values), factor)).tobytes() == bytes(
            values.nbytes
        )


@given(values=stored(), factor=st.floats(-2, 2))
def test_what_is_not_finite_in_the_source_is_kept_or_refused_never_made(
    values: np.ndarray[Any, Any], factor: float
) -> None:
    region = Region("t", (0,), values.shape)
    with np.errstate(all="ignore"):
        try:
            found = round_once(region, values, scale(widened(values), factor))
        except EditError:
            return
        nans = np.isnan(values)
        if factor:
            assert same_bits(found[nans], values[nans])
        assert not np.isnan(found[~nans]).any()
        assert np.isfinite(found[np.isfinite(values)]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(number=st.floats(-60000, 60000), factor=st.floats(-1, 1))
def test_rounding_is_to_nearest_even_as_torch_does_it(
    dtype: str, number: float, factor: float
) -> None:
    numpy, compute, reference = DTYPES[dtype]
    edited = np.array([number * factor], compute)
    found = round_once(ROWS, np.array([7.0], numpy), edited)
    expected = torch.from_numpy(edited).to(reference).view(torch.uint8).numpy()
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("numpy", "source", "edited"),
    [
        (np.float16, 2.0, 65520.0),
        (np.float16, 2.0, np.nan),
        (ml_dtypes.bfloat16, 2.0, 3.4e38),
        (np.float32, 2.0, np.inf),
        (np.float32, np.inf, np.nan),
        (np.float64, 2.0, np.nan),
    ],
)
def test_making_a_nan_or_an_overflow_is_refused_by_tensor_and_index(
    numpy: Any, source: float, edited: float
) -> None:
    values = np.array([[1.0, 1.0], [1.0, source]], numpy)
    numbers = widened(values)
    numbers[1, 1] = edited
    rows = Region("a\nb", (5, 0), (7, 2))
    with pytest.raises(EditError) as caught:
        round_once(rows, values, numbers)
    assert "'a\\nb'" in str(caught.value)
    assert "at [6, 1]" in str(caught.value)
    assert str(caught.value).isprintable()
