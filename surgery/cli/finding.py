"""Commands that look for what to edit."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from surgery.cli.group import cli
from surgery.cli.options import PATH, json_option, model_option, outside_option
from surgery.cli.output import echo_json, json_text, write_text

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

GOAL = (
    click.option(
        "--raise",
        "raised",
        metavar="METRIC",
        help="What there shall be more of (default: the first answers that prompts name).",
    ),
    click.option("--lower", "lowered", metavar="METRIC", help="What there shall be less of."),
)

CHOICES = (
    *GOAL,
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


against_option = click.option(
    "--against",
    metavar="NAME",
    help="The name of the answers opposed to the goal's (default: all others); where the goal "
    "names none, of the unwanted ones.",
)


approximate_option = click.option(
    "--approximate", is_flag=True, help="Also where norms rescale what is written."
)


def position_option(default: str) -> Callable[[Any], Any]:
    return click.option(
        "--position",
        type=click.Choice(["last", "mean"]),
        default=default,
        show_default=True,
        help="The last token of a prompt, or the mean over all.",
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
        return _with(command, *INPUTS, method, *CHOICES)

    return decorate


def _with(command: Any, *options: Any) -> Any:
    for option in reversed(options):
        command = option(command)
    return command


@find.command()
@shared("path", "direct", "gradient")
@against_option
@click.option(
    "--positions",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help="Where path exchanges a head's output; all is a slow check with the same numbers.",
)
def heads(**given: Any) -> None:
    """Attention heads, by path patching (PH3, arXiv 2402.18154).

    Example: surgery find heads --model model/ --train a.jsonl --holdout b.jsonl --output r.yaml
    """
    _run("heads", **given)


@find.command()
@shared("attribution", "ablation", "gradient", "auroc")
@click.option("--tuned", type=PATH, metavar="DIR", help="A sibling that behaves as it should.")
@click.option(
    "--new-tokens",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="How far responses are followed.",
)
@click.option(
    "--languages", metavar="CODES", help="Of responses, as de,fr (default: those prompts name)."
)
def neurons(languages: str | None, **given: Any) -> None:
    """MLP neurons, by what they add at points of language confusion (arXiv 2505.16538).

    Example: surgery find neurons --model m/ --tuned t/ --train a.jsonl --holdout b.jsonl
    --output r.yaml
    """
    _run("neurons", languages=tuple(languages.split(",")) if languages else (), **given)


@find.command()
@shared("difference", "attribution", "direct")
@click.option("--sae", type=PATH, required=True, metavar="DIR", help="A sparse autoencoder.")
@click.option(
    "--patch",
    type=click.Choice(["orthogonalize", "z_project", "steer_bias", "rank1", "append_neuron"]),
    help="What is done with features (default: they are taken out).",
)
@click.option("--strength", type=float, default=1.0, show_default=True, help="How much of it.")
@position_option("mean")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Points that attribution takes the gradient's mean over.",
)
@click.option("--hook", metavar="NAME", help="Where the autoencoder belongs, if it does not say.")
@click.option("--pickle", is_flag=True, help="Read an ae.pt: its tensors alone, in a child.")
@approximate_option
def features(**given: Any) -> None:
    """Features of a sparse autoencoder, by activations or by attribution patching.

    Example: surgery find features --model m/ --sae sae/ --train a.jsonl --holdout b.jsonl
    --output r.yaml
    """
    _run("features", **given)


@find.command()
@shared("eigenshift", "singular", "composition", "effect")
@click.option(
    "--on",
    type=click.Choice(["lm_head", "head"]),
    default="lm_head",
    show_default=True,
    help="Components of the output head (eigenshift), or of attention heads (the others).",
)
@click.option("--factor", type=float, help="They are multiplied by it (default: 0.1; 0 on head).")
@against_option
@click.option("--absolute", is_flag=True, help="Rank by the size of a shift, not its direction.")
@click.option("--fold-norm", is_flag=True, help="Spectra with the norm before attention in them.")
@click.option("--way", type=click.Choice(["q", "k", "v"]), help="How later heads read a component.")
def components(**given: Any) -> None:
    """Singular components: EigenShift (arXiv 2509.16660), Talking Heads (arXiv 2406.09519).

    Example: surgery find components --on lm_head --model m/ --train a.jsonl --holdout b.jsonl
    --output r.yaml
    """
    _run("components", **given)


@find.command()
@shared("separation", "ablation")
@click.option(
    "--to-set", default="target", show_default=True, help="The set the direction points to."
)
@click.option("--from-set", default="preserve", show_default=True, help="The set it comes from.")
@position_option("last")
@click.option(
    "--orthogonalize", is_flag=True, help="Take out its part along the mean of --from-set."
)
@click.option(
    "--strength", type=float, default=1.0, show_default=True, help="How much is taken out."
)
@approximate_option
def direction(**given: Any) -> None:
    """A direction of the residual stream: the difference of the means of two sets of prompts.

    Example: surgery find direction --model m/ --train a.jsonl --holdout b.jsonl --output r.yaml
    """
    _run("direction", **given)


@find.command()
@shared("logit_lens", "tuned_lens", "ablation")
@click.option(
    "--part",
    type=click.Choice(["attn", "mlp", "both"]),
    default="both",
    show_default=True,
    help="What of a layer is taken out.",
)
@against_option
@click.option(
    "--lens", type=PATH, metavar="FILE", help="Trained translators, in place of training."
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="Of training a lens.",
)
@click.option("--rate", type=float, default=1e-3, show_default=True, help="Of training a lens.")
def layers(**given: Any) -> None:
    """Layers, by where a lens sees a prediction turn, or by what is lost without them.

    Example: surgery find layers --method tuned_lens --model m/ --train a.jsonl --holdout b.jsonl
    --output r.yaml
    """
    _run("layers", **given)


def _run(kind: str, **given: Any) -> None:
    from surgery.api import find as run
    from surgery.console.finds import found_text
    from surgery.console.progress import rows_bar

    output, json = given["output"], given.pop("json")
    with rows_bar() as progress:
        found = run(kind, progress=progress, **given)
    echo_json(found.to_json()) if json else click.echo(found_text(found, output))
    sys.exit(0 if found.above_chance else 1)


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers with commas between them."""

    name = "numbers"

    def __init__(self, kind: type[int] | type[float], least: float) -> None:
        self._kind, self._least = kind, least

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        try:
            found = tuple(self._kind(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not numbers with commas between them", param, ctx)
        if not all(self._least <= number < math.inf for number in found):
            self.fail(f"{value!r}: expected {self._least:g} or more, and finite", param, ctx)
        return found


@cli.command("sweep-strength")
@click.argument("recipe", type=PATH)
@model_option
@click.option(
    "--stimuli",
    type=PATH,
    multiple=True,
    required=True,
    metavar="FILE",
    help="Prompts: set target shows the effect, preserve the cost; repeatable.",
)
@GOAL[0]
@GOAL[1]
@click.option(
    "--strengths",
    type=Numbers(float, 0.0),
    metavar="S,S…",
    help="1 is the recipe as it is, 0 nothing of it (default: 0.25 to 1.5, without --top).",
)
@click.option(
    "--top",
    "tops",
    type=Numbers(int, 1),
    metavar="K,K…",
    help="Only the first K addresses of each edit.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@outside_option
@click.option("--report", type=PATH, metavar="FILE", help="Write JSON there.")
@click.option("--html", type=PATH, metavar="FILE", help="Write the table and its picture there.")
@json_option
def sweep_strength(
    recipe: Path, report: Path | None, html: Path | None, json: bool, **given: Any
) -> None:
    """Measure effect and cost of a recipe by strength or number; propose the knee.

    Exit 1 where no setting moves the goal as wanted.

    Example: surgery sweep-strength r.yaml --model model/ --stimuli target.jsonl --html sweep.html
    """
    from surgery.api import sweep_strength as run
    from surgery.console.finds import sweep_text
    from surgery.console.progress import rows_bar
    from surgery.find.sweep_page import sweep_html
    from surgery.report.place import check_place

    inputs = (recipe, *given["stimuli"])
    for target in filter(None, (report, html)):
        check_place(target, inputs, [given["model"]])
    with rows_bar() as progress:
        found = run(recipe, progress=progress, **given)
    if report:
        write_text(report, json_text(found.to_json()))
    if html:
        write_text(html, sweep_html(found, recipe.name))
    echo_json(found.to_json()) if json else click.echo(sweep_text(found))
    sys.exit(1 if found.knee is None else 0)
