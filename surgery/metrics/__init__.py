"""Numbers: distances between outputs, and the behaviour metrics a policy can name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from surgery.errors import PolicyError
from surgery.metrics import plugins
from surgery.metrics.interface import Metric, Observed
from surgery.metrics.word_list import WordList, parts, read_word_lists
from surgery.registry import Registry, suggest

METRICS: Registry[Any] = Registry(
    "metric",
    {
        "answer_logprob": "surgery.metrics.answer_logprob:AnswerLogProbability",
        "answer_rate": "surgery.metrics.answer_rate:AnswerRate",
        "exact_match": "surgery.metrics.exact_match:ExactMatch",
        "kl": "surgery.metrics.kl:KullbackLeibler",
        "line_pass_rate": "surgery.metrics.line_metric:LinePassRate",
        "nll": "surgery.metrics.nll:NegativeLogLikelihood",
        "perplexity": "surgery.metrics.perplexity:Perplexity",
        "word_pass_rate": "surgery.metrics.word_pass_rate:WordPassRate",
        "word_rate": "surgery.metrics.word_rate:WordRate",
    },
)

__all__ = ["METRICS", "Metric", "Observed", "known_metrics", "make_metric", "word_lists_of"]

NONE: Mapping[str, WordList] = MappingProxyType({})


def known_metrics() -> list[str]:
    """Every name there is: our own, and those of installed packages."""
    return sorted({*METRICS, *plugins.names()})


def make_metric(name: str, lists: Mapping[str, WordList] = NONE) -> Metric:
    """The metric a policy calls `name`: one of `known_metrics`, with `:argument` where it takes
    one. `lists` are the files that the argument mentions, by the names it gives them.

    Raises `PolicyError` for an unknown name, a missing or superfluous argument, or a file that is
    not among `lists`, and `EnvironmentFault` for a metric of a package that is broken.
    """
    head, _, argument = name.partition(":")
    found = _class_of(head)
    given: list[Any] = [argument] if argument else []
    if found.files and argument:
        given.append(_mentioned(name, argument, lists))
    try:
        inspect.signature(found).bind(*given)
    except TypeError:
        fix = "takes no argument" if argument else f"needs an argument, as in {head}:NAME"
        raise PolicyError(f"metric {head!r} {fix}") from None
    return plugins.made(found, given)


def word_lists_of(names: Iterable[str], folder: Path) -> dict[str, WordList]:
    """The files that metrics' names mention, relative to `folder` and inside of it.

    Raises `PolicyError` for a file that cannot be used, or a name that mentions one and is unknown.
    """
    arguments = [
        argument
        for head, _, argument in (name.partition(":") for name in names)
        if parts(argument)[0] and _class_of(head).files
    ]
    return read_word_lists(arguments, folder)


def _class_of(head: str) -> type[Metric]:
    if head in METRICS:
        own: type[Metric] = METRICS[head]
        return own
    found = plugins.find(head)
    if found is None:
        raise PolicyError(f"unknown metric {head!r}{suggest(head, known_metrics())}")
    return found


def _mentioned(name: str, argument: str, lists: Mapping[str, WordList]) -> dict[str, WordList]:
    for file in parts(argument)[0]:
        if file not in lists:
            raise PolicyError(f"{name}: names a file, which takes a policy file it lies beside")
    return {file: lists[file] for file in parts(argument)[0]}
