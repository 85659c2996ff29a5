"""Commands that make ONNX graphs and say what is in them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from surgery.cli.group import cli
from surgery.cli.options import PATH, json_option, model_option, task_option
from surgery.cli.output import echo_json

LAYOUTS = ("portable", "linked")


@cli.command()
@click.argument("model", type=PATH)
@click.option("--output", type=PATH, metavar="DIR", help="New folder (default: MODEL-onnx).")
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="portable",
    show_default=True,
    help="portable ships; linked is a graph in MODEL itself that points into its weights.",
)
@task_option
@click.option("--opset", type=int, help="ONNX opset, 18 to 25 (default: 20).")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="What the graph computes in, whatever the weights are stored in.",
)
@click.option(
    "--quantize",
    type=click.Choice(["int8"]),
    help="Weights in 8 bits, by onnxruntime's dynamic quantisation.",
)
@click.option(
    "--report", type=PATH, metavar="DIR", help="Trace anew; torch's own report goes there."
)
@json_option
def export(model: Path, output: Path | None, json: bool, **options: Any) -> None:
    """Export a checkpoint to ONNX.

    Example: surgery export edited/ --output onnx/
    """
    from surgery.api import export as run
    from surgery.console.graphs import export_text
    from surgery.console.progress import staged_bar

    with staged_bar() as (stage, progress):
        done = run(model, output, stage=stage, progress=progress, **options)
    echo_json(done.to_json()) if json else click.echo(export_text(done))


@cli.group()
def cache() -> None:
    """Captured graphs: exports of one config share a graph, whatever the weights.

    They lie below SURGERY_CACHE, else XDG_CACHE_HOME/surgery, else ~/.cache/surgery.

    Example: surgery cache list
    """


@cache.command("list")
@json_option
def cache_list(json: bool) -> None:
    """List the captured graphs, the newest first.

    Example: surgery cache list
    """
    from surgery.console.graphs import cache_text
    from surgery.export.cache import entries

    found = entries()
    echo_json([entry.to_json() for entry in found]) if json else click.echo(cache_text(found))


@cache.command("clear")
def cache_clear() -> None:
    """Remove all captured graphs.

    Example: surgery cache clear
    """
    from surgery.console.words import size
    from surgery.export.cache import clear

    click.echo(f"removed: {size(clear())}")


@cli.command()
@model_option
@click.option("--onnx", type=PATH, required=True, metavar="FILE", help="Any exporter's ONNX file.")
@json_option
def lineage(model: Path, onnx: Path, json: bool) -> None:
    """Prove which checkpoint tensor each initializer is: exit 0 if all are, 1 if one is not.

    Example: surgery lineage --model model/ --onnx onnx/model.onnx
    """
    from surgery.api import lineage as run
    from surgery.console.graphs import lineage_text
    from surgery.console.progress import bar

    with bar("comparing") as progress:
        found = run(model, onnx, progress=progress)
    echo_json(found.to_json()) if json else click.echo(lineage_text(found))
    sys.exit(0 if found.ok else 1)
