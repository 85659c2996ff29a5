"""Sums of each edge and output to rows: the shape of the error, and the tolerances it passes."""

from __future__ import annotations

from collections.abc import Iterable

from surgery.evidence import ErrorShape, Tolerance
from surgery.metrics.distance import ConversionSums
from surgery.metrics.shape import Distribution

Measured = tuple[str, str, ConversionSums]
"""Edge, output and its sums."""

QUANTILES = {"median": 0.5, "p99": 0.99}


def shapes(measured: Iterable[Measured]) -> tuple[ErrorShape, ...]:
    """A row for every output that was compared, caches too: the gate judges each."""
    return tuple(_shape(*one) for one in measured)


def _shape(edge: str, output: str, own: ConversionSums) -> ErrorShape:
    return ErrorShape(
        edge=edge,
        output=output,
        dtype=own.dtype,
        elements=own.difference.count,
        overlap=own.shape.overlap,
        sigma_ratio=own.shape.sigma_ratio,
        **_numbers("noise", own.shape.noise),
        **_numbers("error", own.shape.error),
    )


def _numbers(name: str, own: Distribution) -> dict[str, float]:
    quantiles = dict(zip(QUANTILES, own.histogram.magnitudes(QUANTILES.values()), strict=True))
    found = {"mean": own.mean, "sigma": own.sigma, "max": own.largest, **quantiles}
    return {f"{name}_{key}": value for key, value in found.items()}


def tolerances(measured: Iterable[Measured]) -> tuple[Tolerance, ...]:
    """A row for every output that was compared, caches too."""
    return tuple(
        Tolerance(
            edge=edge,
            output=output,
            elements=own.difference.count,
            rtol=own.tolerance.rtol,
            atol=own.tolerance.atol,
            both=own.tolerance.both,
            outside=own.tolerance.outside,
        )
        for edge, output, own in measured
    )
