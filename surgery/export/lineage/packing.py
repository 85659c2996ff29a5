"""Weights in 8 bits against the checkpoint: which tensor, by which scheme, to the last integer."""

from __future__ import annotations

from surgery.errors import quote
from surgery.export.expressions import Expression
from surgery.export.lineage import diagnosis
from surgery.export.lineage.comparing import equals
from surgery.export.lineage.diagnosis import diagnose
from surgery.export.lineage.quantised import Dequantised, Packed, Quantise, same_parameters, schemes
from surgery.export.lineage.result import MISMATCH, PROVEN, UNMATCHED, Fault, Row
from surgery.export.lineage.tracer import Traced, Tracer

_TOLERANCE = 0.01
"""Of the largest number: 8 bits round to half of 1/127 of it."""


def trace_packed(tracer: Tracer, weight: Packed) -> list[Traced]:
    """What the three initializers of an 8-bit weight are."""
    numbers = Dequantised(weight)
    expectation = tracer.expected.of(numbers, weight.base)
    wanted = list(tracer.forms(numbers, expectation.expression)) if expectation else []
    wanted.sort(key=lambda form: -tracer.catalogue.likeness(numbers, form, _TOLERANCE))
    near = tracer.catalogue.near(numbers, _TOLERANCE)
    for form in dict.fromkeys([*wanted, *([near] if near else [])]):
        scheme = _proof(tracer, weight, form)
        if scheme is not None:
            return _proven(weight, scheme, wanted)
    target = wanted[0] if wanted else near
    if target is None:
        return [Traced(Row(name, UNMATCHED)) for name in weight.names]
    is_near = tracer.catalogue.likeness(numbers, target, _TOLERANCE) > 0
    return _mismatch(tracer, weight, target, is_near)


def _proof(tracer: Tracer, weight: Packed, form: Expression) -> Quantise | None:
    """The scheme under which a form is the weight, in every integer, scale and zero point."""
    for scheme in schemes(weight, form, tracer.checkpoint):
        if same_parameters(weight, scheme) and equals(weight.values, scheme, tracer.checkpoint):
            return scheme
    return None


def _proven(weight: Packed, scheme: Quantise, wanted: list[Expression]) -> list[Traced]:
    tensor = scheme.tensors()[0]
    if not wanted or tensor in wanted[0].tensors():
        return [Traced(Row.of(name, PROVEN, scheme)) for name in weight.names]
    should = wanted[0].tensors()[0]
    message = f"it holds {quote(tensor, 200)} instead"
    return _rows(weight, wanted[0], _fault(diagnosis.WRONG, weight, should, message), tensor)


def _mismatch(tracer: Tracer, weight: Packed, target: Expression, is_near: bool) -> list[Traced]:
    tensor = target.tensors()[0]
    for scheme in schemes(weight, target, tracer.checkpoint):
        if same_parameters(weight, scheme):
            symptom, message = diagnose(weight.values, scheme, tracer.checkpoint)
            return _rows(weight, scheme, _fault(symptom, weight, tensor, message))
    if is_near:
        message = "no scheme of quantize_dynamic gives its scale and zero point"
        return _rows(weight, target, _fault(diagnosis.QUANTISED, weight, tensor, message))
    message = "its contents are other ones"
    return _rows(weight, target, _fault(diagnosis.STALE, weight, tensor, message))


def _rows(
    weight: Packed, expression: Expression, fault: Fault, holds: str | None = None
) -> list[Traced]:
    """Three rows; the fault is told once, of the values."""
    rows = [Row.of(name, MISMATCH, expression) for name in weight.names]
    return [Traced(rows[0], (fault,), holds), *map(Traced, rows[1:])]


def _fault(symptom: str, weight: Packed, tensor: str, message: str) -> Fault:
    name = weight.values.name
    said = f"initializer {quote(name, 200)} should be {quote(tensor, 200)} in 8 bits: {message}"
    return Fault(symptom, name, tensor, said)
