"""Weights are compared to the last bit, however they are cut into blocks, bands and tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from surgery.export.lineage import blocks
from surgery.export.lineage.stored import Stored

DTYPES = [np.dtype(name) for name in ("float64", "float32", "float16", ml_dtypes.bfloat16)]
SIZES = st.integers(1, 23)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, bands and tiles of which a small matrix has many, the last of each cut short."""
    monkeypatch.setattr(blocks, "BLOCK", 7)
    monkeypatch.setattr(blocks, "BAND_BYTES", 160)
    monkeypatch.setattr(blocks, "_WIDTH", 3)
    monkeypatch.setattr(blocks, "_HEIGHT", 2)


def on_disk(path: Path, values: NDArray[Any], offset: int) -> Stored:
    path.write_bytes(b"x" * offset + values.tobytes() + b"y" * 64)
    return Stored("w", values.dtype, values.shape, path, offset)


@given(SIZES, SIZES, st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_one_changed_bit_is_found_wherever_it_is(
    tmp_path: Path,
    rows: int,
    columns: int,
    kept: np.dtype[Any],
    used: np.dtype[Any],
    data: st.DataObject,
) -> None:
    drawn = np.random.default_rng(rows * 100 + columns).standard_normal((rows, columns))
    values = drawn.astype(kept)
    tensor = on_disk(tmp_path / "tensor", values, 24)
    turned = data.draw(st.booleans())
    compare = blocks.same_turned if turned else blocks.same
    wide = values.astype(np.float32) if used == np.float16 else values
    wanted = np.ascontiguousarray((wide.T if turned else wide).astype(used))
    in_memory = Stored("w", used, wanted.shape, data=wanted.reshape(-1).view(np.uint8))
    assert compare(on_disk(tmp_path / "weights", wanted, 8), tensor)
    assert compare(in_memory, tensor)
    raw = wanted.reshape(-1).view(np.uint8)
    bit = data.draw(st.integers(0, raw.size * 8 - 1))
    raw[bit // 8] ^= 1 << bit % 8
    assert not compare(on_disk(tmp_path / "weights", wanted, 8), tensor)
    assert not compare(in_memory, tensor)
