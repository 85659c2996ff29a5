"""Options that several commands take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)


model_option = click.option(
    "--model", type=PATH, required=True, metavar="DIR", help="Checkpoint folder; only read."
)


output_option = click.option(
    "--output", type=PATH, required=True, metavar="DIR", help="New folder."
)


policy_option = click.option(
    "--policy", type=PATH, metavar="FILE", help="Limits to judge by (default: the built-in ones)."
)


stimuli_option = click.option(
    "--stimuli", type=PATH, multiple=True, metavar="FILE", help="JSON lines of prompts; repeatable."
)


json_option = click.option("--json", is_flag=True, help="Print JSON.")


outside_option = click.option(
    "--allow-outside", is_flag=True, help="Let the recipe read files outside its folder."
)


code_option = click.option(
    "--allow-code", is_flag=True, help="Accept a config.json that names code; it is never run."
)


task_option = click.option(
    "--task",
    metavar="TASK",
    help="causal-lm, causal-lm-with-past, encoder or sequence-classification.",
)


seed_option = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the probes."
)


class Seconds(click.FloatRange):
    """A finite number of seconds; every comparison with NaN is false, so a range holds it."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return seconds


timeout_option = click.option(
    "--timeout",
    type=Seconds(min=0, min_open=True),
    default=1800,
    show_default=True,
    help="Seconds each corner may take.",
)


stream_option = click.option(
    "--stream", is_flag=True, help="Hold one layer in memory at a time; tells each layer's error."
)


budget_option = click.option(
    "--budget",
    type=Seconds(min=0, min_open=True),
    help="Seconds for all corners together; what is left goes to further probes.",
)


def pair_options(command: Any) -> Any:
    """What a differential run compares: a model and its ONNX file, and the edited ones."""
    for option in (
        click.option("--edited-onnx", type=PATH, metavar="FILE", help="The edited model's file."),
        click.option("--edited", type=PATH, metavar="DIR", help="The edited checkpoint."),
        click.option("--onnx", type=PATH, metavar="FILE", help="Its ONNX file, any exporter's."),
        model_option,
    ):
        command = option(command)
    return command
