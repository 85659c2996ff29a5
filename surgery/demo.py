"""The main job on the repository's own fixtures, and a planted fault that must be caught."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint import RECEIPT, Staging
from surgery.checkpoint.receipt import EDIT_PREDICATE, open_receipt
from surgery.errors import InputError
from surgery.export import onnxfile
from surgery.export.external import location
from surgery.gate import EXIT_CODES, FAIL, judge
from surgery.pipeline import EDITED, MODEL, ONNX, REPORT_HTML, REPORT_JSON, diff, validate
from surgery.policy import load_policy
from surgery.report import Report, load_report, render

Show = Callable[[str], None]

DAMAGED = "damaged"


@dataclass(frozen=True)
class Case:
    """One recipe of the demo: what it is about, its fixture, recipe and policy files."""

    title: str
    fixture: str
    recipe: str


CASES = (
    Case("heads: answer from memory, not from the prompt", "capitals-gpt2", "remember"),
    Case("neurons: answer in the language of the question", "polyglot-llama", "unconfuse"),
    Case("SAE feature: stop copying the stated capital", "capitals-gpt2", "sae-z"),
)


def run(output: Path, show: Show, progress: Show) -> bool:
    """Runs every case into `output`; True if all pass and the planted fault fails.

    Raises `InputError` where the repository's fixtures are not at hand.
    """
    fixtures = find_fixtures()
    with Staging(output, (fixtures,)) as staging:
        passed = [_run_case(case, fixtures, staging.path, output, show, progress) for case in CASES]
        caught = _run_damaged(CASES[0], fixtures, staging.path, output, show, progress)
        staging.commit()
    return all(passed) and caught


def find_fixtures() -> Path:
    """The `fixtures` folder of the repository: beside the package, or in the working folder."""
    places = (Path(__file__).resolve().parent.parent / "fixtures", Path.cwd() / "fixtures")
    for place in places:
        if all((place / case.fixture / f"{case.recipe}.yaml").is_file() for case in CASES):
            return place
    raise InputError(
        f"the demo needs the repository's fixtures, which are not at {places[0]} or {places[1]}; "
        "run it in a clone"
    )


def _run_case(
    case: Case, fixtures: Path, folder: Path, output: Path, show: Show, progress: Show
) -> bool:
    fixture = fixtures / case.fixture
    report = validate(
        fixture / f"{case.recipe}.yaml",
        fixture,
        folder / case.recipe,
        policy=load_policy(fixture / f"{case.recipe}.policy.yaml"),
        stimuli=_stimuli(fixture),
        progress=lambda stage: progress(f"{case.recipe}: {stage}"),
    )
    show(f"━━━ {case.title} ({case.fixture}, {case.recipe}.yaml)\n")
    show(_summary(report))
    show(f"report: {output / case.recipe / REPORT_HTML}\n")
    return report.verdict == "pass"


def _run_damaged(
    case: Case, fixtures: Path, folder: Path, output: Path, show: Show, progress: Show
) -> bool:
    """Leaves one layer of the edited export stale and judges it again; True if that fails."""
    fixture, clean = fixtures / case.fixture, folder / case.recipe
    damaged = folder / DAMAGED
    shutil.copytree(clean / ONNX["C_e"], damaged)
    tensor = _leave_stale(clean, damaged / MODEL)
    report = diff(
        fixture,
        onnx=clean / ONNX["C_o"] / MODEL,
        edited=clean / EDITED,
        edited_onnx=damaged / MODEL,
        stimuli=_stimuli(fixture),
        policy=load_policy(fixture / f"{case.recipe}.policy.yaml"),
        progress=lambda stage: progress(f"damaged export: {stage}"),
        root=folder,
    )
    (damaged / REPORT_JSON).write_text(render(report, "json"), "utf-8")
    (damaged / REPORT_HTML).write_text(render(report, "html"), "utf-8")
    show(f"━━━ planted fault: {tensor} left stale in the edited export\n")
    show(_summary(report))
    show(f"report: {output / DAMAGED / REPORT_HTML}\n")
    verdict = judge(load_report(damaged / REPORT_JSON).evidence(), report.policy)
    caught = verdict.verdict == FAIL and any(tensor in f.site for f in verdict.findings)
    show(
        f"surgery gate {output / DAMAGED / REPORT_JSON}: {verdict.verdict}, exit code "
        f"{EXIT_CODES[verdict.verdict]}; the fault was {'caught and named' if caught else 'MISSED'}"
    )
    return caught


def _leave_stale(clean: Path, damaged: Path) -> str:
    """Puts the original's bytes of the first edited tensor into the damaged export."""
    receipt = open_receipt(clean / EDITED / RECEIPT, EDIT_PREDICATE)
    tensor = str(receipt["predicate"]["tensors"][0]["name"])
    stale, _ = _stored(clean / ONNX["C_o"] / MODEL, tensor)
    _, place = _stored(damaged, tensor)
    with place.file.open("r+b") as data:
        data.seek(place.offset)
        data.write(stale)
    return tensor


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int


def _stored(model: Path, name: str) -> tuple[bytes, _Place]:
    """The external bytes of initializer `name` and where they lie."""
    proto = onnxfile.read(model)
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    relative, offset, length = location(tensor, str(model))
    place = _Place(model.parent / relative, offset)
    with place.file.open("rb") as data:
        data.seek(offset)
        return data.read(length), place


def _stimuli(fixture: Path) -> list[Path]:
    return [fixture / "stimuli" / f"{name}.jsonl" for name in ("target", "preserve")]


def _summary(report: Report) -> str:
    from surgery.report.text import Text

    return Text(brief=True).render(report)
