"""Metrics that other installed packages bring: entry points of the group `surgery.metrics`.

A package names a class that keeps the contract of `surgery.metrics.Metric`:

    [project.entry-points."surgery.metrics"]
    politeness = "my_package.metrics:Politeness"

Names of our own metrics win. Code is loaded from packages that somebody installed, and from nowhere
else: no checkpoint, recipe or policy can bring any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast, get_args

from surgery.errors import EnvironmentFault, SurgeryError, quote
from surgery.metrics.interface import Metric, Needs

GROUP = "surgery.metrics"

QUANTITIES = ("flip_rate", "kl_99%", "kl_median", "log_ratio", "parted_rate", "real_flip_rate")
"""What intervals of a report are of, besides metrics."""


def names() -> list[str]:
    """The names that installed packages give."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def find(name: str) -> type[Metric] | None:
    """The class that a package calls `name`; None if none does.

    Raises `EnvironmentFault`, which names the package, where several packages have the name, or
    where the class cannot be loaded or does not keep the contract.
    """
    entries = list(entry_points(group=GROUP, name=name))
    if not entries:
        return None
    if len({entry.value for entry in entries}) > 1:
        several = " and ".join(sorted(map(_package, entries)))
        raise EnvironmentFault(f"metric {quote(name)} is in {several}; uninstall all but one")
    [entry, *_] = entries
    try:
        found = entry.load()
    except Exception as error:  # whatever the package's own code raises
        raise _broken(_package(entry), name, f"{type(error).__name__}: {error}") from error
    if problem := _problem(name, found):
        raise _broken(_package(entry), name, f"{quote(entry.value)} {problem}")
    # A class of its own, so that the package's stays as it is.
    return cast("type[Metric]", type(found.__name__, (found,), {"origin": _package(entry)}))


def made(found: type[Metric], given: Sequence[Any]) -> Metric:
    """The class called with what was given; `EnvironmentFault` names the package whose own code
    raises something."""
    call: Callable[..., Metric] = found
    try:
        return call(*given)
    except SurgeryError:
        raise
    except Exception as error:  # a package's own code may raise anything; ours is let through
        if not found.origin:
            raise
        raise _broken(found.origin, found.__name__, f"{type(error).__name__}: {error}") from error


def _problem(name: str, found: object) -> str:
    """What keeps an object from being a metric's class under that name."""
    if name in QUANTITIES:
        return f"has a name that other figures of a report have: {', '.join(QUANTITIES)}"
    if not (isinstance(found, type) and issubclass(found, Metric)):
        return "is no class of surgery.metrics.Metric"
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        return f"lacks {', '.join(missing)}"
    if not isinstance(getattr(found, "unit", None), str):
        return "has no unit"
    if getattr(found, "needs", None) not in get_args(Needs):
        return f"needs one of {', '.join(get_args(Needs))}"
    return ""


def _package(entry: EntryPoint) -> str:
    package = entry.dist
    return f"{package.name} {package.version}" if package else "an unknown package"


def _broken(package: str, name: str, why: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"metric {quote(name)} of the package {package} cannot be used: {quote(why)}; "
        "repair or uninstall the package"
    )
