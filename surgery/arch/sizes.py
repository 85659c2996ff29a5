"""Sizes of one model: from `config.json`, by the expressions of its family's file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from surgery.arch.facts import FamilyFacts, SizeFact
from surgery.errors import ArchitectureError

MAX_LAYERS = 100_000
MAX_EXPERTS = 1_000_000
"""Of all layers together."""
_MAX_SIZE = 2**31 - 1
_TERM = re.compile(r"([+-]?)([^+-]+)")
_FACTOR = re.compile(r"(\*|//|^)(\w+)")


def read_sizes(facts: FamilyFacts, config: Mapping[str, Any]) -> dict[str, int]:
    """Every size of the family, `z_width` = heads · head_dim and `kv_width` with it.

    Raises `ArchitectureError` for a value that is no size and for sizes that contradict.
    """
    sizes: dict[str, int] = {}
    for name, fact in facts.sizes.items():
        key, value = _field(fact, config)
        if value is None:
            value = evaluate(_default(fact, key), sizes)
        if type(value) is not int or not fact.least <= value <= _MAX_SIZE:
            raise ArchitectureError(
                f"config.json: {key or name} is {ascii(value)[:80]}; "
                f"expected an integer from {fact.least} to {_MAX_SIZE}"
            )
        sizes[name] = value
        if {"heads", "kv_heads", "head_dim"} <= sizes.keys():
            sizes["z_width"] = sizes["heads"] * sizes["head_dim"]
            sizes["kv_width"] = sizes["kv_heads"] * sizes["head_dim"]
    _check(sizes)
    return sizes


def _field(fact: SizeFact, config: Mapping[str, Any]) -> tuple[str | None, Any]:
    """The field that is there and its value; the first key and None where none is."""
    found = {key: config[key] for key in fact.keys if key in config}
    values = [value for value in found.values() if value is not None]
    if any(value != values[0] for value in values):
        said = " and ".join(f"{key} {ascii(value)[:40]}" for key, value in found.items())
        raise ArchitectureError(f"config.json: {said} are one size; expected them to be equal")
    if not found:
        return None, None
    return next(iter(found)), values[0] if values else None


def _default(fact: SizeFact, key: str | None) -> int | str:
    return fact.null if key is not None and fact.null is not None else fact.default


def _check(sizes: Mapping[str, int]) -> None:
    if sizes["layers"] > MAX_LAYERS:
        raise ArchitectureError(f"config.json: {sizes['layers']} layers is more than {MAX_LAYERS}")
    if sizes["layers"] * sizes.get("experts", 0) > MAX_EXPERTS:
        raise ArchitectureError(
            f"config.json: {sizes['experts']} experts in each of {sizes['layers']} layers is more "
            f"than {MAX_EXPERTS}"
        )
    if sizes["heads"] % sizes["kv_heads"]:
        raise ArchitectureError("config.json: heads must be a multiple of key-value heads")


def evaluate(expression: int | str, sizes: Mapping[str, int]) -> int:
    """A size as family files write it: sums of products of numbers and names of sizes, such as
    `z_width+2*kv_width` or `width//heads`. Raises `ArchitectureError` for a division by zero."""
    if isinstance(expression, int):
        return expression
    return sum(
        (-1 if sign == "-" else 1) * _product(term, sizes)
        for sign, term in _TERM.findall(expression)
    )


def _product(term: str, sizes: Mapping[str, int]) -> int:
    value = 1
    for operator, name in _FACTOR.findall(term):
        factor = int(name) if name.isdigit() else sizes[name]
        if operator == "//" and factor == 0:
            raise ArchitectureError(f"config.json: {name} is 0; expected a positive number")
        value = value // factor if operator == "//" else value * factor
    return value
