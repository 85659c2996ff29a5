"""The `surgery` command: parse, call one library function, print.

Exit codes: 0 pass, 1 the verdict is fail, 2 bad input or usage, 3 environment or internal error,
5 nothing was compared, 130 and 143 on signals. Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import traceback
from json import dumps
from pathlib import Path
from types import FrameType
from typing import Any

import click

from surgery.errors import EnvironmentFault, SurgeryError

LAYOUTS = ("portable", "linked")
FORMATS = ("text", "json", "md", "html")

TRUE = frozenset({"1", "true", "t", "yes", "y", "on"})

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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="weight-surgery", prog_name="surgery")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Edit transformer weights, ship them through ONNX, and prove that both did what was asked.

    Start with `surgery demo`, or: surgery validate recipe.yaml --model model/ --output out/
    """


@cli.command()
@click.argument("model", type=PATH)
@code_option
@json_option
def inspect(model: Path, allow_code: bool, json: bool) -> None:
    """Show family, sizes, tensors and their roles, from headers alone.

    Example: surgery inspect fixtures/capitals-gpt2
    """
    from surgery.api import inspect as run
    from surgery.console import inspection_text

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
    from surgery.console import plan_json, plan_text

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
    from surgery.console import bar, count
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
    from surgery.console import bar, count

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
    from surgery.console import bar

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
    from surgery.console import comparison_text

    found = run(a, b, allow_code=allow_code)
    echo_json(asdict(found)) if json else click.echo(comparison_text(found))
    sys.exit(1 if exit_code and not found.same else 0)


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
    from surgery.console import export_text, staged_bar

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
    from surgery.console import cache_text
    from surgery.export.cache import entries

    found = entries()
    echo_json([entry.to_json() for entry in found]) if json else click.echo(cache_text(found))


@cache.command("clear")
def cache_clear() -> None:
    """Remove all captured graphs.

    Example: surgery cache clear
    """
    from surgery.console import size
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
    from surgery.console import bar, lineage_text

    with bar("comparing") as progress:
        found = run(model, onnx, progress=progress)
    echo_json(found.to_json()) if json else click.echo(lineage_text(found))
    sys.exit(0 if found.ok else 1)


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
    from surgery.console import stages
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
    from surgery.console import stages
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

    from surgery.console import doctor_text
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
    from surgery.console import stages

    with stages() as progress:
        passed = run(output, show=click.echo, progress=progress)
    sys.exit(0 if passed else 1)


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
    from surgery.console import localization_text, stages
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
    from surgery.console import stages
    from surgery.differential import Limits
    from surgery.gate import EXIT_CODES
    from surgery.repro import text

    with stages() as progress:
        found = run(output=output, limits=Limits(timeout), progress=progress, **options)
    echo_json(found.to_json()) if json else click.echo(text(found, output))
    sys.exit(EXIT_CODES[found.verdict])


def terminal_text(report: Any, brief: bool = False) -> str:
    """A report for stdout, as wide as the terminal and with colours if that is wanted."""
    from surgery.report.text import Text, wanted_width, wants_color

    color, width = wants_color(sys.stdout), wanted_width(sys.stdout)
    return Text(color=color, width=width, brief=brief).render(report)


def finish(report: Any, tail: str = "") -> None:
    """Prints a report and leaves with its verdict's exit code."""
    from surgery.gate import EXIT_CODES

    click.echo(terminal_text(report, brief=True), nl=False)
    if tail:
        click.echo(tail)
    sys.exit(EXIT_CODES[report.verdict])


def echo_json(value: Any) -> None:
    from surgery.report.model import plain

    click.echo(dumps(plain(value), indent=2, default=str, allow_nan=False))


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.staging")
    try:
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


class Terminated(BaseException):
    """SIGTERM or SIGHUP, as an exception, so that staged folders are cleaned up."""


def main() -> None:
    """The entry point: `cli` with errors as one line and their exit codes."""
    try:
        _handle_signals()
        code = _call()
    except KeyboardInterrupt:
        code = 130
    except Terminated:
        code = 143
    sys.exit(code)


def _handle_signals() -> None:
    """Makes exceptions of signals, but for those that whoever started us has them ignore."""
    handlers: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: _terminate,
        signal.SIGHUP: _terminate,
    }
    for number, handler in handlers.items():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _call() -> int:
    """The exit code of one call."""
    debug = "--debug" in sys.argv[1:] or os.environ.get("SURGERY_DEBUG", "").lower() in TRUE
    try:
        options: dict[str, Any] = {"prog_name": "surgery", "auto_envvar_prefix": "SURGERY"}
        return int(cli.main(standalone_mode=False, **options) or 0)
    except click.exceptions.Abort:
        return 130
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return error.exit_code
    except click.ClickException as error:
        return _complain(_usage_message(error), 2)
    except SurgeryError as error:
        return _complain(str(error), error.exit_code, debug)
    except OSError as error:
        fault = EnvironmentFault(f"{error.filename or 'system'}: {error.strerror}")
        return _complain(str(fault), fault.exit_code, debug)
    except Exception as error:  # the last resort: an error of ours, said in one line
        hint = "" if debug else "; --debug before the command shows where"
        return _complain(f"internal error: {type(error).__name__}: {error}{hint}", 3, debug)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _usage_message(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context else ""
    return f"{error.format_message()}{hint}"


def _complain(message: str, code: int, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    line = " ".join(message.split())
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    click.echo(f"surgery: error: {printable}", err=True)
    return code


if __name__ == "__main__":
    main()
