"""Faults planted in the numbers of one initializer, and the word lineage must find for each.

A fault gets the weight as the checkpoint has it, so that a row is a row of the tensor whichever way
round the graph keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from surgery.export.lineage import diagnosis

Array = NDArray[Any]


@dataclass(frozen=True)
class Fault:
    """`plant(values, other)` damages a copy; `other` is the same tensor of another model. `fits`
    says which tensors it can happen to."""

    symptom: str
    plant: Callable[[Array, Array], Array]
    fits: Callable[[Array], bool] = lambda values: True


def _stale(values: Array, other: Array) -> Array:
    return other


def _turn(values: Array, other: Array) -> Array:
    return np.ascontiguousarray(values.T)


def _scale(values: Array, other: Array) -> Array:
    return values * np.float32(1.002)


def _truncate(values: Array, other: Array) -> Array:
    flat = values.reshape(-1).copy()
    flat[len(flat) // 2 :] = 0
    return flat.reshape(values.shape)


def _zero(values: Array, other: Array) -> Array:
    return np.zeros_like(values)


def _middle(values: Array) -> tuple[int, ...]:
    return tuple(size // 2 for size in values.shape)


def _element(values: Array, other: Array) -> Array:
    changed = values.copy()
    changed[_middle(values)] = np.nextafter(changed[_middle(values)], np.float32(9))
    return changed


def _sign(values: Array, other: Array) -> Array:
    changed = values.copy()
    changed[_middle(values)] *= -1
    return changed


def _row(values: Array, other: Array) -> Array:
    changed = values.copy()
    changed[len(values) // 2] = other[len(values) // 2]
    return changed


def _column(values: Array, other: Array) -> Array:
    changed = values.copy()
    changed[:, values.shape[1] // 2] = other[:, values.shape[1] // 2]
    return changed


def _round(values: Array, other: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def _shift(values: Array, other: Array) -> Array:
    return np.roll(values.reshape(-1), -1).reshape(values.shape)


def _matrix(values: Array) -> bool:
    return values.ndim == 2 and min(values.shape) > 2


def _square(values: Array) -> bool:
    return _matrix(values) and values.shape[0] == values.shape[1]


FAULTS = {
    "stale": Fault(diagnosis.STALE, _stale),
    "transposed": Fault(diagnosis.TRANSPOSED, _turn, _square),
    "scaled": Fault(diagnosis.SCALED, _scale),
    "truncated": Fault(diagnosis.TRUNCATED, _truncate),
    "zeroed": Fault(diagnosis.TRUNCATED, _zero),
    "one element": Fault(diagnosis.ELEMENT, _element),
    "one sign": Fault(diagnosis.ELEMENT, _sign),
    "one row": Fault(diagnosis.ROW, _row, _matrix),
    "one column": Fault(diagnosis.COLUMN, _column, _matrix),
    "rounded": Fault(diagnosis.ROUNDED, _round),
}
"""By what was done; swaps and shifts need more than one weight, or its bytes, and are elsewhere."""
