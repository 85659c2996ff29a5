"""The commands as functions. Paths may be strings; policies are files or `Policy` objects.

Each raises what its command would exit with: `surgery.errors` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import InputError
from surgery.registry import suggest

if TYPE_CHECKING:  # a command imports what it uses and no more
    from surgery.apply import Applied
    from surgery.arch.inspection import Inspection
    from surgery.checkpoint.parallel import Progress
    from surgery.compare import Comparison
    from surgery.export import ExportResult
    from surgery.export.lineage import Lineage
    from surgery.find.result import Found
    from surgery.find.sweep import Sweep
    from surgery.gate import Verdict
    from surgery.localize import Localization
    from surgery.plan import Plan
    from surgery.policy import Policy
    from surgery.report import Report
    from surgery.repro import Repros
    from surgery.revert import Restored
    from surgery.verify import Verification

__all__ = [
    "apply",
    "demo",
    "diff",
    "diff_weights",
    "export",
    "find",
    "gate",
    "inspect",
    "lineage",
    "localize",
    "plan",
    "report",
    "repro",
    "revert",
    "schema",
    "sweep_strength",
    "validate",
    "verify",
]

AnyPath = str | PathLike[str]
Stages = Callable[[str], None]


def inspect(model: AnyPath, *, allow_code: bool = False) -> Inspection:
    """Family, sizes, dtypes, tensors and their roles, ties; from headers alone."""
    from surgery.arch.inspection import inspect as run

    return run(Path(model), allow_code=allow_code)


def plan(
    recipe: AnyPath, model: AnyPath, *, allow_outside: bool = False, allow_code: bool = False
) -> Plan:
    """What applying `recipe` to `model` will do; reads no weights."""
    from surgery.plan import plan as run

    return run(Path(recipe), Path(model), allow_outside=allow_outside, allow_code=allow_code)


def apply(
    recipe: AnyPath,
    model: AnyPath,
    output: AnyPath,
    *,
    allow_outside: bool = False,
    allow_code: bool = False,
    delta: AnyPath | None = None,
    link: bool = False,
    trust_receipt: bool = False,
    progress: Progress | None = None,
) -> Applied | Restored:
    """Writes the edited checkpoint and its receipt to the new folder `output`.

    `recipe` may be a delta (a `.safetensors` file) that was made from this base: then the same
    edited checkpoint is written again, and of the options only `allow_code` and `progress`
    have a meaning. With `link`, shards without an edit become hard links to the base's, which ONNX
    tools refuse as external data. With `trust_receipt`, digests of the base are taken from its own
    receipt.
    """
    from surgery.apply import apply as run
    from surgery.revert import apply_delta

    source = Path(recipe)
    if source.suffix == ".safetensors":
        options = {"delta": delta, "link": link, "trust_receipt": trust_receipt}
        for name in (name for name, given in options.items() if given):
            raise InputError(
                f"{source}: is a delta already; --{name.replace('_', '-')} goes with a recipe"
            )
        return apply_delta(
            Path(model), source, Path(output), allow_code=allow_code, progress=progress
        )
    return run(
        source,
        Path(model),
        Path(output),
        allow_outside=allow_outside,
        allow_code=allow_code,
        delta=_path(delta),
        link=link,
        trust_receipt=trust_receipt,
        progress=progress,
    )


def revert(
    edited: AnyPath,
    delta: AnyPath,
    output: AnyPath,
    *,
    allow_code: bool = False,
    progress: Progress | None = None,
) -> Restored:
    """Writes the base of `edited` again, every file to the byte, to the new folder `output`."""
    from surgery.revert import revert as run

    paths = (Path(edited), Path(delta), Path(output))
    return run(*paths, allow_code=allow_code, progress=progress)


def verify(
    edited: AnyPath,
    *,
    base: AnyPath | None = None,
    recipe: AnyPath | None = None,
    allow_code: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Re-checks every digest; with `base`, every edited region and every other byte too."""
    from surgery.verify import verify as run

    paths = (Path(edited), _path(base), _path(recipe))
    return run(*paths, allow_code=allow_code, progress=progress)


def diff_weights(a: AnyPath, b: AnyPath, *, allow_code: bool = False) -> Comparison:
    """Which tensors of two checkpoints differ, where and by how much."""
    from surgery.compare import diff_weights as run

    return run(Path(a), Path(b), allow_code=allow_code)


def export(
    model: AnyPath, output: AnyPath | None = None, *, stage: Stages | None = None, **options: Any
) -> ExportResult:
    """Exports `model` to ONNX; `options` are those of `surgery.export.export`.

    Portable models go to the new folder `output`, by default beside the model; linked ones lie
    in the model's own folder.
    """
    from surgery.export import export as run

    return run(Path(model), _path(output), stage=stage, **options)


def lineage(model: AnyPath, onnx: AnyPath, *, progress: Progress | None = None) -> Lineage:
    """Which checkpoint tensor each initializer of `onnx` is, proven bit for bit."""
    from surgery.export.lineage import trace

    return trace(Path(onnx), Path(model), progress=progress)


def diff(
    model: AnyPath,
    *,
    onnx: AnyPath | None = None,
    edited: AnyPath | None = None,
    edited_onnx: AnyPath | None = None,
    stimuli: Sequence[AnyPath] = (),
    policy: Policy | AnyPath | None = None,
    **options: Any,
) -> Report:
    """The differential test; `options` are those of `surgery.pipeline.diff`."""
    from surgery.pipeline import diff as run

    return run(
        Path(model),
        onnx=_path(onnx),
        edited=_path(edited),
        edited_onnx=_path(edited_onnx),
        stimuli=_paths(stimuli),
        policy=_policy(policy),
        **options,
    )


def localize(
    model: AnyPath,
    *,
    onnx: AnyPath | None = None,
    edited: AnyPath | None = None,
    edited_onnx: AnyPath | None = None,
    stimuli: Sequence[AnyPath] = (),
    **options: Any,
) -> dict[str, Localization]:
    """Where conversions part from PyTorch; `options` are those of `surgery.pipeline.localize`."""
    from surgery.pipeline import localize as run

    return run(
        Path(model),
        onnx=_path(onnx),
        edited=_path(edited),
        edited_onnx=_path(edited_onnx),
        stimuli=_paths(stimuli),
        **options,
    )


def repro(
    model: AnyPath,
    output: AnyPath,
    *,
    onnx: AnyPath | None = None,
    edited: AnyPath | None = None,
    edited_onnx: AnyPath | None = None,
    stimuli: Sequence[AnyPath] = (),
    **options: Any,
) -> Repros:
    """A bundle for each fault; `options` are those of `surgery.pipeline.repro`."""
    from surgery.pipeline import repro as run

    return run(
        Path(model),
        Path(output),
        onnx=_path(onnx),
        edited=_path(edited),
        edited_onnx=_path(edited_onnx),
        stimuli=_paths(stimuli),
        **options,
    )


def validate(
    recipe: AnyPath,
    model: AnyPath,
    output: AnyPath,
    *,
    stimuli: Sequence[AnyPath] = (),
    policy: Policy | AnyPath | None = None,
    **options: Any,
) -> Report:
    """Apply, export, four corners, report; `options` are those of `surgery.pipeline.validate`."""
    from surgery.pipeline import validate as run

    return run(
        Path(recipe),
        Path(model),
        Path(output),
        stimuli=_paths(stimuli),
        policy=_policy(policy),
        **options,
    )


def find(
    kind: str,
    model: AnyPath,
    output: AnyPath,
    *,
    train: Sequence[AnyPath],
    holdout: Sequence[AnyPath],
    method: str | None = None,
    raised: str | None = None,
    lowered: str | None = None,
    top: int | None = None,
    seed: int = 0,
    budget: int = 1024,
    report: AnyPath | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Found:
    """What to edit, written as the recipe `output`, with every candidate and the figures beside it.

    `kind` is `heads`, `neurons`, `features`, `components`, `direction` or `layers`; `options` are
    those of its command. `raised` or `lowered` names the metric to move, as a policy does; without
    either the first answers of the target prompts are to be given more often.
    """
    from surgery.find.opening import Asked
    from surgery.find.run import find as run
    from surgery.find.run import silent

    name, sign = _goal(raised, lowered)
    asked = Asked(Path(model), _paths(train), _paths(holdout), name, sign, top, seed, budget)
    return run(
        kind,
        asked,
        Path(output),
        report=_path(report),
        method=method,
        progress=progress or silent,
        **options,
    )


def sweep_strength(
    recipe: AnyPath,
    model: AnyPath,
    *,
    stimuli: Sequence[AnyPath],
    strengths: Sequence[float] | None = None,
    tops: Sequence[int] | None = None,
    raised: str | None = None,
    lowered: str | None = None,
    seed: int = 0,
    allow_outside: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """What a recipe does and costs at several strengths (1: as it is), or with the first so many
    addresses of each edit, or at each of both; by default at six strengths."""
    from surgery.find.opening import Asked
    from surgery.find.run import silent, sweep
    from surgery.find.sweep import STRENGTHS, Setting

    name, sign = _goal(raised, lowered)
    asked = Asked(Path(model), (), _paths(stimuli), name, sign, seed=seed)
    wanted = strengths or ((1.0,) if tops else STRENGTHS)
    settings = [Setting(strength, top) for top in tops or (None,) for strength in wanted]
    told = progress or silent
    return sweep(Path(recipe), asked, settings, allow_outside=allow_outside, progress=told)


def gate(report: Report | AnyPath, policy: Policy | AnyPath | None = None) -> Verdict:
    """The verdict on a report, under its own policy or another."""
    from surgery.gate import judge

    loaded = _report(report)
    return judge(loaded.evidence(), loaded.policy if policy is None else _policy(policy))


def report(source: Report | AnyPath, format: str = "text") -> str:
    """A report as text, json, md or html."""
    from surgery.report import RENDERERS, render

    if format not in RENDERERS:
        raise InputError(f"unknown report format {format!r}{suggest(format, RENDERERS)}")
    return render(_report(source), format)


def schema(kind: str) -> dict[str, Any]:
    """The JSON Schema of a `recipe`, a `policy` or a `report`."""
    from surgery.policy import policy_schema
    from surgery.recipe import recipe_schema
    from surgery.report import report_schema

    makers = {"recipe": recipe_schema, "policy": policy_schema, "report": report_schema}
    if kind not in makers:
        raise InputError(f"unknown schema {kind!r}{suggest(kind, makers)}")
    return makers[kind]()


def demo(output: AnyPath, *, show: Stages = print, progress: Stages | None = None) -> bool:
    """The main job on the repository's fixtures; True if clean runs pass and damage is caught."""
    from surgery.demo import run
    from surgery.pipeline import silent

    return run(Path(output), show, progress or silent)


def _path(path: AnyPath | None) -> Path | None:
    return None if path is None else Path(path)


def _paths(paths: Sequence[AnyPath]) -> tuple[Path, ...]:
    return tuple(map(Path, paths))


def _goal(raised: str | None, lowered: str | None) -> tuple[str | None, int]:
    """The metric that is to move, None for the one that prompts suggest, and which way."""
    if raised and lowered:
        raise InputError("--raise and --lower name one metric between them; leave one out")
    return raised or lowered, -1 if lowered else 1


def _policy(policy: Policy | AnyPath | None) -> Policy:
    from surgery.policy import BUILT_IN, load_policy

    if isinstance(policy, str | PathLike):
        return load_policy(policy)
    return BUILT_IN if policy is None else policy


def _report(report: Report | AnyPath) -> Report:
    from surgery.report import load_report

    return load_report(report) if isinstance(report, str | PathLike) else report
