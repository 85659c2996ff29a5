"""From what the user named to what is compared: checkpoints with their ONNX files, by edge."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.differential import Limits, Pair, Workload, make_workload
from surgery.errors import InputError
from surgery.export import CACHED, Task, choose_task, export, export_graph, onnxfile
from surgery.export.layouts.linked import links
from surgery.policy import Policy
from surgery.runtimes.graph import has_cache
from surgery.stimuli.prompts import load_stimuli

MODEL = "model.onnx"
ONNX = {"C_o": "onnx/original", "C_e": "onnx/edited"}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What every corner is asked; made first, so that bad input costs no export."""

    task: Task
    workload: Workload


@dataclass(frozen=True)
class Comparison:
    """The pairs by edge, what they are asked, and how they are run."""

    pairs: dict[str, Pair]
    asked: Asked
    limits: Limits
    progress: Progress


@dataclass(frozen=True)
class Given:
    """What the user named: an ONNX file that is None is exported."""

    model: Path
    onnx: Path | None
    edited: Path | None
    edited_onnx: Path | None


def ask(model: Path, stimuli: Sequence[Path], policy: Policy, task: str | None, seed: int) -> Asked:
    """The task and the workload for a model; raises `InputError` for what it cannot take."""
    wanted = choose_task(model, task)
    base, given = Checkpoint.open(model), load_stimuli(stimuli)
    return Asked(wanted, make_workload(base, identify(base), wanted, given, policy, seed))


@contextmanager
def prepared(
    given: Given,
    stimuli: Sequence[Path],
    policy: Policy,
    task: str | None,
    seed: int,
    limits: Limits,
    progress: Progress,
) -> Iterator[tuple[Comparison, Path]]:
    """What is compared, and a folder for the time being, which ends with it."""
    if given.edited is None and given.edited_onnx is not None:
        raise InputError("an edited ONNX file needs the edited checkpoint: give --edited too")
    models = {"C_o": given.model} | ({"C_e": given.edited} if given.edited else {})
    files = {"C_o": given.onnx, "C_e": given.edited_onnx}
    _check_same_shape(given.model, given.edited)
    asked = ask(given.model, stimuli, policy, task, seed)
    for path in filter(None, files.values()):
        progress(f"check of {path}")
        onnxfile.check(path)
        if has_cache(onnxfile.read(path)) and asked.task.causal and not asked.task.cache:
            if task is not None:
                raise InputError(
                    f"{path}: has a key-value cache, which task {task} would leave unseen; "
                    f"give --task {CACHED} or none"
                )
            asked = ask(given.model, stimuli, policy, CACHED, seed)
    with tempfile.TemporaryDirectory(prefix="surgery-onnx-") as folder:
        scratch = Path(folder)
        pairs = {}
        for edge, model in models.items():
            file = files[edge]
            if file is None:
                progress(f"export of {model}")
            pairs[edge] = (
                Pair(model, file) if file else _convert(model, scratch / ONNX[edge], asked.task)
            )
        yield Comparison(pairs, asked, limits, progress), scratch


def _convert(model: Path, output: Path, task: Task) -> Pair:
    """The model as an ONNX graph in the new folder `output`, whose weights stay where they are;
    those of a folder of links, which ONNX tools refuse to follow, are copied."""
    if links(Checkpoint.open(model)):
        export(model, output, task=task.name)
        return Pair(model, output / MODEL)
    output.mkdir(parents=True)
    export_graph(model, output / MODEL, task=task.name)
    return Pair(model, output / MODEL, initializers=model)


def _check_same_shape(model: Path, edited: Path | None) -> None:
    """Original and edited outputs are subtracted, so both models must be of one shape."""
    original = identify(Checkpoint.open(model))
    other = identify(Checkpoint.open(edited)) if edited else original
    for name in ("vocab", "width", "layers"):
        if (original.family, original.sizes[name]) != (other.family, other.sizes[name]):
            raise InputError(
                f"{edited}: is a {other.family} with {name} {other.sizes[name]}; {model} is a "
                f"{original.family} with {name} {original.sizes[name]}"
            )
