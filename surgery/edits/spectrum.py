"""Singular vectors of matrices that are never in memory whole, and which of them an edit means.

Components are numbered from 0 by falling singular value. A singular vector has no sign of its
own: each is given here with its largest-magnitude entry positive.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from surgery.errors import EditError, quote

Vectors = NDArray[np.float64]

LEAST_GAP = 1e-12
"""Two singular values whose squares differ by less than this part of the largest are equal: their
vectors are any two directions of a plane."""


def of_gram(gram: Vectors) -> tuple[Vectors, Vectors]:
    """Squared singular values [d] and right singular vectors [d, d] of W, from a finite WᵀW.

    A vector is exact to about ε·σ₁²/|σ_i² − σ_j²| of its neighbour, ε = 2e-16: that is the price
    of the Gram matrix, at which small components suffer first.
    """
    values, vectors = np.linalg.eigh(gram)
    return np.maximum(values[::-1], 0), signed(vectors[:, ::-1])


def of_product(left: Vectors, right: Vectors) -> tuple[Vectors, Vectors, Vectors]:
    """Left vectors [d, r], squared singular values [r] and right vectors [d, r] of left·rightᵀ.

    Both are [d, r] with r no larger than d: the [d, d] product is never formed.
    """
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right)
    u, singular, vt = np.linalg.svd(r_left @ r_right.T)
    return signed(q_left @ u), singular**2, signed(q_right @ vt.T)


def signed(vectors: Vectors) -> Vectors:
    """Each column with its largest-magnitude entry positive, the first of equal ones."""
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    return np.asarray(vectors * np.where(largest < 0, -1.0, 1.0), np.float64)


def chosen(squares: Vectors, vectors: Vectors, components: Sequence[int], what: object) -> Vectors:
    """The columns `components` of `vectors`.

    Raises `EditError` where one that is chosen and one that is not have the same singular value,
    so that neither is a direction of its own.
    """
    taken = np.isin(np.arange(len(squares)), components)
    split = np.flatnonzero(
        (taken[1:] != taken[:-1]) & (squares[:-1] - squares[1:] <= LEAST_GAP * squares[0])
    )
    if split.size:
        raise EditError(
            f"components {split[0]} and {split[0] + 1} of {quote(what)} have the same singular "
            "value and no directions of their own; choose both or neither"
        )
    return vectors[:, list(components)]


def distinct(squares: Vectors) -> NDArray[np.bool_]:
    """Which components [d] have a direction of their own, whatever others are chosen."""
    apart = squares[:-1] - squares[1:] > LEAST_GAP * squares[0]
    return np.asarray(np.append(True, apart) & np.append(apart, True), np.bool_)


def refuse_missing(components: Sequence[int], count: int, what: object) -> None:
    """Raises `EditError` for a component past the last."""
    if max(components) >= count:
        raise EditError(
            f"component {max(components)} is out of range; {what} has components 0 to {count - 1}"
        )


def refuse_nonfinite(matrix: Vectors, what: object) -> None:
    """Raises `EditError` for a matrix without a spectrum."""
    if not np.isfinite(matrix).all():
        raise EditError(f"{quote(what)} holds NaN or infinities and has no spectrum")
