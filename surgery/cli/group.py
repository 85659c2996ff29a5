"""The command that all others belong to."""

from __future__ import annotations

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="weight-surgery", prog_name="surgery")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Edit transformer weights, ship them through ONNX, and prove that both did what was asked.

    Start with `surgery demo`, or: surgery validate recipe.yaml --model model/ --output out/
    """
