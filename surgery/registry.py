"""Registries: names to classes, resolved on use, so that listing them imports nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """An immutable mapping of names to `"module:attribute"`, imported when first asked for.

    Iterating, `len` and `in` never import a member; indexing imports just that one.
    Unknown names raise `KeyError` with the nearest known ones.
    """

    def __init__(self, noun: str, members: Mapping[str, str]) -> None:
        self.noun = noun
        self._members = dict(members)

    def __getitem__(self, name: str) -> T:
        if name not in self._members:
            raise KeyError(f"unknown {self.noun} {name!r}{suggest(name, self._members)}")
        module, _, attribute = self._members[name].partition(":")
        member: T = getattr(import_module(module), attribute)
        return member

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members


def suggest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, else the list of what is known."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
