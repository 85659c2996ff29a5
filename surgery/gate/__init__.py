"""Evidence and policy to a verdict; `surgery.gate.verdict` has the law."""

from surgery.gate.noise import WRONG_SHAPE, noise_dtype
from surgery.gate.verdict import (
    EXIT_CODES,
    FAIL,
    NOT_EVALUATED,
    PASS,
    RHO_NAMES,
    Verdict,
    judge,
    name_rho,
)

__all__ = [
    "EXIT_CODES",
    "FAIL",
    "NOT_EVALUATED",
    "PASS",
    "RHO_NAMES",
    "WRONG_SHAPE",
    "Verdict",
    "judge",
    "name_rho",
    "noise_dtype",
]
