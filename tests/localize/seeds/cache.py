"""Key-value caches that are not read, or not given, as they should be."""

from __future__ import annotations

from collections.abc import Callable

from onnx import ModelProto

from tests.differential import mutants
from tests.localize.seeds.target import Target, Truth, Unfit


def _past(how: Callable[[ModelProto, str], None], part: str) -> Callable[[Target], Truth]:
    return _cache(how, "past_key_values.{}." + part)


def _present(how: Callable[[ModelProto, str], None], part: str) -> Callable[[Target], Truth]:
    return _cache(how, "present.{}." + part)


def _cache(how: Callable[[ModelProto, str], None], pattern: str) -> Callable[[Target], Truth]:
    def plant(target: Target) -> Truth:
        name = pattern.format(target.layer)
        graph = target.model.graph
        if name not in {value.name for value in (*graph.input, *graph.output)}:
            raise Unfit
        how(target.model, name)
        return Truth()

    return plant


def _rename(model: ModelProto, name: str) -> None:
    mutants.rename_value(model, name, "another_cache")


def _swap(one: str, other: str) -> Callable[[Target], Truth]:
    """Two outputs under each other's names."""

    def plant(target: Target) -> Truth:
        first, second = (name.format(target.layer, target.layer - 1) for name in (one, other))
        if not {first, second} <= {value.name for value in target.model.graph.output}:
            raise Unfit
        for old, new in ((first, "held"), (second, first), ("held", second)):
            mutants.rename_value(target.model, old, new)
        return Truth()

    return plant


def _stale(model: ModelProto, name: str) -> None:
    """Gives back what it was given, so that the new positions are lost."""
    mutants._redirect(model, name, f"{name}.full")
    for node in model.graph.node:
        node.output[:] = [f"{name}.full" if value == name else value for value in node.output]
    past = name.replace("present", "past_key_values")
    model.graph.node.append(mutants.helper.make_node("Identity", [past], [name]))


SEEDS: dict[str, Callable[[Target], Truth]] = {
    "key cache one off": _past(mutants.lose_oldest, "key"),
    "value cache one off": _past(mutants.lose_oldest, "value"),
    "key cache ignored": _past(mutants.zero_input, "key"),
    "value cache ignored": _past(mutants.zero_input, "value"),
    "key cache missing": _present(mutants.drop_output, "key"),
    "value cache missing": _present(mutants.drop_output, "value"),
    "key cache under another name": _present(_rename, "key"),
    "key cache zero": _present(mutants.zero_output, "key"),
    "value cache scaled 0.2%": _present(lambda m, n: mutants.scale_output(m, n, 1.002), "value"),
    "key cache stale": _present(_stale, "key"),
    "value cache stale": _present(_stale, "value"),
    "keys and values exchanged": _swap("present.{0}.key", "present.{0}.value"),
    "layers' caches exchanged": _swap("present.{0}.value", "present.{1}.value"),
}
