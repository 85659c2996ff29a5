"""Commands that compare models with their conversions and judge."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from surgery.cli.group import cli
from surgery.cli.options import (
    PATH,
    budget_option,
    json_option,
    model_option,
    output_option,
    outside_option,
    pair_options,
    policy_option,
    seed_option,
    stimuli_option,
    stream_option,
    task_option,
    timeout_option,
)
from surgery.cli.output import echo_json, finish, terminal_text, write_text

FORMATS = ("text", "json", "md", "html")


@cli.command()
@pair_options
@stimuli_option
@policy_option
@task_option
@seed_option
@timeout_option
@stream_option
@budget_option
@click.option("--batch", metavar="NAME", help="Run this batch of a report again, alone.")
@click.option("--aa", is_flag=True, help="Also run each corner against itself, many ways (slow).")
@click.option("--report", type=PATH, required=True, metavar="FILE", help="Where to write JSON.")
def diff(report: Path, policy: Path | None, timeout: float, **options: Any) -> None:
    """Test a conversion, or with --edited all four corners.

    Example: surgery diff --model model/ --onnx model.onnx --report report.json
    """
    from surgery.api import diff as run
    from surgery.console.progress import stages
    from surgery.differential import Limits
    from surgery.report.place import check_place

    given = (options["onnx"], options["edited_onnx"], policy, *options["stimuli"])
    folders = filter(None, (options["model"], options["edited"]))
    check_place(report, filter(None, given), folders)
    with stages() as progress:
        found = run(**options, policy=policy, limits=Limits(timeout), progress=progress)
    write_text(report, found.dump())
    finish(found)


@cli.command()
@click.argument("recipe", type=PATH)
@model_option
@output_option
@policy_option
@stimuli_option
@outside_option
@task_option
@seed_option
@timeout_option
@stream_option
@budget_option
def validate(recipe: Path, output: Path, timeout: float, **options: Any) -> None:
    """Apply, export, test the four corners, report and judge.

    Example: surgery validate recipe.yaml --model model/ --output out/ --stimuli target.jsonl
    """
    from surgery.api import validate as run
    from surgery.console.progress import stages
    from surgery.differential import Limits

    with stages() as progress:
        found = run(recipe, output=output, limits=Limits(timeout), progress=progress, **options)
    finish(found, f"report {output}/report.html")


@cli.command()
@click.argument("report", type=PATH)
@click.option(
    "--policy", type=PATH, metavar="FILE", help="Limits to judge by (default: the report's own)."
)
@json_option
def gate(report: Path, policy: Path | None, json: bool) -> None:
    """Judge a report: exit 0 for pass, 1 for fail, 5 if nothing was compared.

    Example: surgery gate report.json --policy policy.yaml
    """
    from surgery.api import gate as run
    from surgery.gate import EXIT_CODES

    found = run(report, policy)
    if json:
        echo_json(found)
    else:
        click.echo(f"verdict: {found.verdict}")
        for finding in found.findings:
            click.echo(f"{finding.stage}: {finding.symptom}: {finding.message}")
    sys.exit(EXIT_CODES[found.verdict])


@cli.command()
@click.argument("report", type=PATH)
@click.option("--format", type=click.Choice(FORMATS), default="text", show_default=True)
@click.option("--output", type=PATH, metavar="FILE", help="Write there instead of to stdout.")
def report(report: Path, format: str, output: Path | None) -> None:
    """Render a report.

    Example: surgery report report.json --format html --output report.html
    """
    from surgery.report import load_report, render

    if output is not None:
        from surgery.report.place import check_place

        check_place(output, [report])
    found = load_report(report)
    if output is None:
        text = terminal_text(found) if format == "text" else render(found, format)
        click.echo(text, nl=False)
    else:
        write_text(output, render(found, format))


@cli.command()
@pair_options
@stimuli_option
@task_option
@seed_option
@timeout_option
@json_option
def localize(timeout: float, json: bool, **options: Any) -> None:
    """Show which module and operator bring an error in; exit 1 where one does.

    Example: surgery localize --model model/ --onnx model.onnx
    """
    from surgery.api import localize as run
    from surgery.console.places import localization_text
    from surgery.console.progress import stages
    from surgery.differential import Limits

    with stages() as progress:
        found = run(**options, limits=Limits(timeout), progress=progress)
    if json:
        echo_json({edge: own.to_json() for edge, own in found.items()})
    else:
        click.echo("\n\n".join(localization_text(edge, own) for edge, own in found.items()))
    sys.exit(0 if all(own.clean for own in found.values()) else 1)


@cli.command()
@pair_options
@output_option
@stimuli_option
@task_option
@seed_option
@timeout_option
@json_option
def repro(output: Path, timeout: float, json: bool, **options: Any) -> None:
    """Write a bundle for each fault that shows it by itself; exit 1 where there is one.

    Example: surgery repro --model model/ --onnx model.onnx --output bundles/
    """
    from surgery.api import repro as run
    from surgery.console.progress import stages
    from surgery.differential import Limits
    from surgery.gate import EXIT_CODES
    from surgery.repro import text

    with stages() as progress:
        found = run(output=output, limits=Limits(timeout), progress=progress, **options)
    echo_json(found.to_json()) if json else click.echo(text(found, output))
    sys.exit(EXIT_CODES[found.verdict])
