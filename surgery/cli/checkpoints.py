"""Commands that read and write checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from surgery.cli.group import cli
from surgery.cli.options import (
    PATH,
    code_option,
    json_option,
    model_option,
    output_option,
    outside_option,
)
from surgery.cli.output import echo_json


@cli.command()
@click.argument("model", type=PATH)
@code_option
@json_option
def inspect(model: Path, allow_code: bool, json: bool) -> None:
    """Show family, sizes, tensors and their roles, from headers alone.

    Example: surgery inspect fixtures/capitals-gpt2
    """
    from surgery.api import inspect as run
    from surgery.console.checkpoints import inspection_text

    found = run(model, allow_code=allow_code)
    echo_json(found.to_json()) if json else click.echo(inspection_text(found))


@cli.command()
@click.argument("recipe", type=PATH)
@model_option
@outside_option
@code_option
@json_option
def plan(recipe: Path, model: Path, json: bool, **options: Any) -> None:
    """Show what a recipe would change; reads no weights.

    Example: surgery plan recipe.yaml --model model/
    """
    from surgery.api import plan as run
    from surgery.console.checkpoints import plan_json, plan_text

    found = run(recipe, model, **options)
    echo_json(plan_json(found)) if json else click.echo(plan_text(found))


@cli.command()
@click.argument("recipe", type=PATH, metavar="RECIPE|DELTA")
@model_option
@output_option
@click.option("--delta", type=PATH, metavar="FILE", help="Also write what leads back to the base.")
@click.option("--link", is_flag=True, help="Hard-link shards that no edit touches.")
@click.option(
    "--trust-receipt",
    is_flag=True,
    help="Take digests of the base from its own receipt, where its files are as that says.",
)
@outside_option
@code_option
def apply(recipe: Path, model: Path, output: Path, **options: Any) -> None:
    """Write the edited checkpoint and its receipt, from a recipe or a delta.

    Example: surgery apply recipe.yaml --model model/ --output edited/
    """
    from surgery.api import apply as run
    from surgery.checkpoint import RECEIPT
    from surgery.console.progress import bar
    from surgery.console.words import count
    from surgery.revert import Restored

    with bar("editing") as progress:
        done = run(recipe, model, output, **options, progress=progress)
    if isinstance(done, Restored):
        click.echo(f"{output}: {count(done.files, 'file')} as the delta says")
    else:
        click.echo(f"{output}: {count(len(done.edited), 'tensor')} edited, see {RECEIPT} in it")
        for note in done.notes:
            click.echo(note, err=True)
        for tensor, found in done.nonfinite.items():
            click.echo(f"kept {count(found, 'non-finite number')} of {tensor}", err=True)


@cli.command()
@click.argument("edited", type=PATH)
@click.option("--delta", type=PATH, required=True, metavar="FILE", help="What apply wrote.")
@output_option
@code_option
def revert(edited: Path, delta: Path, output: Path, allow_code: bool) -> None:
    """Write the base of an edited checkpoint again, every file to the byte.

    Example: surgery revert edited/ --delta edited.safetensors --output base/
    """
    from surgery.api import revert as run
    from surgery.console.progress import bar
    from surgery.console.words import count

    with bar("restoring") as progress:
        done = run(edited, delta, output, allow_code=allow_code, progress=progress)
    click.echo(f"{output}: {count(done.files, 'file')} restored to the byte")
    for file in done.lost:
        click.echo(f"not restored, no delta carries other weight formats: {file}", err=True)


@cli.command()
@click.argument("edited", type=PATH)
@click.option("--base", type=PATH, metavar="DIR", help="Also recompute every edited region.")
@click.option("--recipe", type=PATH, metavar="FILE", help="Needed where the recipe reads files.")
@code_option
@json_option
def verify(edited: Path, json: bool, **options: Any) -> None:
    """Re-check an edited checkpoint against its receipt and its base.

    Example: surgery verify edited/ --base model/
    """
    from dataclasses import asdict

    from surgery.api import verify as run
    from surgery.console.progress import bar

    with bar("checking") as progress:
        found = run(edited, **options, progress=progress)
    if json:
        echo_json({"ok": found.ok, **asdict(found)})
    else:
        for finding in found.findings:
            click.echo(f"{finding.symptom}: {finding.message}")
        checked = f"{found.files} files" + (
            f" and {found.tensors} tensors" if options["base"] else ""
        )
        click.echo(f"{edited}: {'ok' if found.ok else 'FAILED'}, {checked} checked")
    sys.exit(0 if found.ok else 1)


@cli.command("diff-weights")
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@code_option
@json_option
@click.option("--exit-code", is_flag=True, help="Exit 1 if anything differs.")
def diff_weights(a: Path, b: Path, allow_code: bool, json: bool, exit_code: bool) -> None:
    """Show which tensors of two checkpoints differ, where, by how much and in what rank.

    Example: surgery diff-weights model/ edited/
    """
    from dataclasses import asdict

    from surgery.api import diff_weights as run
    from surgery.console.checkpoints import comparison_text

    found = run(a, b, allow_code=allow_code)
    echo_json(asdict(found)) if json else click.echo(comparison_text(found))
    sys.exit(1 if exit_code and not found.same else 0)
