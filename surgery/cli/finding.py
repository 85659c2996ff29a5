"""Commands that look for what to edit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from surgery.cli.group import cli
from surgery.cli.options import PATH, json_option, model_option
from surgery.cli.output import echo_json

INPUTS = (
    model_option,
    click.option(
        "--train",
        type=PATH,
        multiple=True,
        required=True,
        metavar="FILE",
        help="JSON lines of prompts to look with; repeatable.",
    ),
    click.option(
        "--holdout",
        type=PATH,
        multiple=True,
        required=True,
        metavar="FILE",
        help="Other prompts, to measure the effect and, in set preserve, the cost; repeatable.",
    ),
)

CHOICES = (
    click.option("--raise", "raised", metavar="METRIC", help="What the edit shall make more of."),
    click.option("--lower", "lowered", metavar="METRIC", help="What it shall make less of."),
    click.option(
        "--top",
        type=click.IntRange(min=1),
        metavar="K",
        help="How many to edit (default: what serves a quarter of the training prompts best).",
    ),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
    click.option(
        "--budget",
        type=click.IntRange(min=1),
        default=1024,
        show_default=True,
        help="Rows that run at once: memory follows it.",
    ),
    click.option(
        "--output", type=PATH, required=True, metavar="FILE", help="The recipe, a .yaml file."
    ),
    click.option(
        "--report", type=PATH, metavar="FILE", help="Figures as JSON (default: beside the recipe)."
    ),
    json_option,
)


@cli.group()
def find() -> None:
    """Find what to edit, by the methods of published research, and write it as a recipe.

    Exit 0 only if the effect on held-out prompts is beyond that of random edits of equal size.
    Interrupted, the same command goes on where it stopped.

    Example: surgery find heads --model model/ --train a.jsonl --holdout b.jsonl --output r.yaml
    """


def shared(*methods: str) -> Callable[[Any], Any]:
    """The options that all kinds share; the first of the methods is the default."""
    method = click.option(
        "--method", type=click.Choice(methods), default=methods[0], show_default=True
    )

    def decorate(command: Any) -> Any:
        for option in reversed((*INPUTS, method, *CHOICES)):
            command = option(command)
        return command

    return decorate


@find.command()
@shared("path", "direct", "gradient")
@click.option("--against", metavar="NAME", help="The answers' name of the rival answer.")
@click.option(
    "--positions",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help="Where a head's output is exchanged.",
)
def heads(**given: Any) -> None:
    """Attention heads, by path patching (PH3, arXiv 2402.18154).

    Example: surgery find heads --model model/ --train a.jsonl --holdout b.jsonl --output r.yaml
    """
    _run("heads", **given)


def _run(kind: str, **given: Any) -> None:
    from surgery.api import find as run
    from surgery.console import found_text, rows_bar

    output, json = given["output"], given.pop("json")
    with rows_bar() as progress:
        found = run(kind, progress=progress, **given)
    echo_json(found.to_json()) if json else click.echo(found_text(found, output))
    sys.exit(0 if found.above_chance else 1)
