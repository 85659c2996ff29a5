"""Numbers: distances between outputs, and the behaviour metrics a policy can name."""

from __future__ import annotations

from typing import Any

from surgery.errors import PolicyError
from surgery.metrics.interface import Metric, Observed
from surgery.registry import Registry

METRICS: Registry[Any] = Registry(
    "metric",
    {
        "answer_rate": "surgery.metrics.answer_rate:AnswerRate",
        "line_pass_rate": "surgery.metrics.line_metric:LinePassRate",
        "nll": "surgery.metrics.nll:NegativeLogLikelihood",
    },
)

__all__ = ["METRICS", "Metric", "Observed", "make_metric"]


def make_metric(name: str) -> Metric:
    """The metric a policy calls `name`: a registered one, with `:argument` where it takes one.

    Raises `PolicyError` for an unknown name or a missing or superfluous argument.
    """
    head, _, argument = name.partition(":")
    try:
        metric: Metric = METRICS[head](argument) if argument else METRICS[head]()
    except KeyError as error:
        raise PolicyError(str(error.args[0])) from None
    except TypeError:
        fix = "takes no argument" if argument else f"needs an argument, as in {head}:NAME"
        raise PolicyError(f"metric {head!r} {fix}") from None
    return metric
