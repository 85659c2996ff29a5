"""Commands about the tool itself."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path

import click

from surgery.cli.group import cli
from surgery.cli.options import PATH, json_option
from surgery.cli.output import echo_json


@cli.command()
@click.argument("kind", type=click.Choice(["recipe", "policy", "report"]))
def schema(kind: str) -> None:
    """Print the JSON Schema of a recipe, a policy or a report.

    Example: surgery schema recipe > recipe.schema.json
    """
    from surgery.api import schema as run

    echo_json(run(kind))


@cli.command()
@json_option
def doctor(json: bool) -> None:
    """Look at versions, CPU, memory, disk and file systems: exit 1 if one will not do.

    Example: surgery doctor
    """
    from dataclasses import asdict

    from surgery.console.graphs import doctor_text
    from surgery.doctor import examine

    found = examine()
    # Not `echo_json`, which needs a package that may be missing.
    told = dumps({"ok": found.ok, **asdict(found)}, indent=2) if json else doctor_text(found)
    click.echo(told)
    sys.exit(0 if found.ok else 1)


@cli.command()
@click.option("--output", type=PATH, default=Path("demo"), show_default=True, metavar="DIR")
def demo(output: Path) -> None:
    """Run the main job on the repository's fixtures, and catch a planted fault.

    Example: surgery demo --output demo/
    """
    from surgery.api import demo as run
    from surgery.console.progress import stages

    with stages() as progress:
        passed = run(output, show=click.echo, progress=progress)
    sys.exit(0 if passed else 1)
