"""Every kind of finding keeps the contract, and its command takes what it takes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from surgery.cli import cli
from surgery.cli.finding import find
from surgery.find import FINDERS
from surgery.find.interface import Finder, Ranking

MODEL = Path(__file__).resolve().parents[2] / "fixtures" / "capitals-gpt2"
KINDS = tuple(FINDERS)


def shared_options() -> set[str]:
    """What every kind's command takes."""
    taken = [{option.name for option in find.commands[kind].params} for kind in KINDS]
    return set.intersection(*taken) - {"method"}


def made(kind: str) -> Finder:
    """A finder as the command makes it without options, but for those it must be given."""
    given: dict[str, Any] = {"sae": MODEL / "sae-resid"} if kind == "features" else {}
    return FINDERS[kind](method=FINDERS[kind].methods[0], **given)


def test_every_kind_has_a_command_and_every_command_a_kind() -> None:
    assert set(find.commands) == set(KINDS) and "find" in cli.commands


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_takes_what_its_finder_takes(kind: str) -> None:
    command, finder = find.commands[kind], FINDERS[kind]
    options = {option.name: option for option in command.params}
    assert finder.kind == kind
    assert {own.name for own in fields(finder)} == set(options) - shared_options()
    method = options["method"]
    assert isinstance(method.type, click.Choice)
    assert tuple(method.type.choices) == finder.methods and method.default == finder.methods[0]
    assert finder.sizes == tuple(sorted(set(finder.sizes))) and finder.sizes[0] >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_option_that_is_not_given_is_the_finders_own_default(kind: str) -> None:
    """So that the command and the function do the same."""
    own, needed = made(kind), ["--model", "m", "--train", "t", "--holdout", "h", "--output", "o"]
    needed += ["--sae", str(MODEL / "sae-resid")] if kind == "features" else []
    given = find.commands[kind].make_context(kind, needed).params
    for name in (own_field.name for own_field in fields(own)):
        assert (given[name] or None) == (getattr(own, name) or None), name


@pytest.mark.parametrize(
    ("kind", "columns", "listed"),
    [
        ("heads", ("layer", "head"), "heads"),
        ("neurons", ("layer", "neuron"), "neurons"),
        ("features", ("feature",), "features"),
        ("components", ("component",), "components"),
        ("layers", ("layer",), "layers"),
    ],
)
def test_a_recipe_lists_what_was_chosen_best_first(
    kind: str, columns: tuple[str, ...], listed: str
) -> None:
    """What a sweep over fewer addresses relies on."""
    rows = tuple((*[number] * len(columns), 0.0) for number in (3, 1, 2))
    facts = {"layer": 1, "site": "hook_resid_post"}
    ranking = Ranking((*columns, "score"), rows, facts=facts)
    lab: Any = SimpleNamespace(arch=SimpleNamespace(tied=False), tensors="t.safetensors")
    finder = made(kind)
    wanted = [made(kind).propose(lab, ranking, [index]).entries[0][listed][0] for index in range(3)]
    assert finder.propose(lab, ranking, range(3)).entries[0][listed] == wanted
    assert finder.propose(lab, ranking, [1, 0]).entries[0][listed] == wanted[1::-1]
