"""What a search starts from: the live model, its prompts, the goal, and where it left off."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.checkpoint.files import sha256_file
from surgery.errors import FindError, quote
from surgery.find.interface import Finder, Goal, Lab
from surgery.find.journal import Journal
from surgery.find.search import Prompts
from surgery.metrics import make_metric, word_lists_of
from surgery.places import cache_home
from surgery.runtimes.child import default_threads
from surgery.runtimes.interface import ModelRef
from surgery.runtimes.pytorch import TorchRuntime
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import TOKENIZER, Tokenizer, load_stimuli

Progress = Callable[[str, int, int], None]

VALIDATION = 4
"""One of so many training prompts chooses how many candidates are taken."""

LEAST = 8
"""Fewer validation prompts choose nothing."""

BUDGET = 1024
"""Rows that run at once; at one position each they take less than a prompt's own pass."""


@dataclass(frozen=True)
class Asked:
    """What the user asks of a search: files of stimuli, the metric to move (None: the one that the
    stimuli suggest) and the direction, how many candidates (None: as many as serve best)."""

    model: Path
    train: Sequence[Path]
    holdout: Sequence[Path]
    goal: str | None = None
    sign: int = 1
    top: int | None = None
    seed: int = 0
    budget: int = BUDGET


def open_lab(asked: Asked, finder: Finder, tensors: str, progress: Progress) -> tuple[Lab, Prompts]:
    """The live model and the prompts, split as the seed says.

    `tensors` is the name of the safetensors file beside the recipe. Raises the `InputError` of
    anything that cannot be used.
    """
    train, holdout = load_stimuli(asked.train), load_stimuli(asked.holdout)
    _refuse_seen(train, holdout)
    named = ((asked.train, train), (asked.holdout, holdout))
    goal = make_goal(asked.goal or suggested(train), asked.sign, named)
    scoring, prompts = _split(train, holdout, asked)
    options = [(field.name, _stamp(getattr(finder, field.name))) for field in fields(finder)]
    stimuli = [sha256_file(path) for path in (*asked.train, *asked.holdout)]
    key = (finder.kind, options, stimuli, asked.top)
    return make_lab(asked, scoring, goal, tensors, key, progress), prompts


def make_lab(
    asked: Asked,
    train: tuple[Stimulus, ...],
    goal: Goal,
    tensors: str,
    key: Any,
    progress: Progress,
) -> Lab:
    """The live model; the journal is that of the model's files by size and time, of what is asked,
    and of `key`, which names all else that the work depends on."""
    checkpoint = Checkpoint.open(asked.model)
    arch = identify(checkpoint)
    tokenizer = Tokenizer(asked.model) if (asked.model / TOKENIZER).is_file() else None
    runtime = TorchRuntime(ModelRef("torch", asked.model, "causal-lm"), default_threads())
    weights = [_stamp(checkpoint.path(file)) for file in checkpoint.weight_files]
    own = (str(asked.model.resolve()), weights, goal.name, goal.sign, asked.seed, asked.budget, key)
    digest = hashlib.sha256(repr((version("weight-surgery"), own)).encode()).hexdigest()[:32]
    return Lab(
        checkpoint,
        arch,
        runtime,
        tokenizer,
        train,
        goal,
        asked.seed,
        asked.budget,
        tensors,
        Journal(cache_home() / "find" / digest),
        progress,
    )


def make_goal(
    name: str, sign: int, prompts: Iterable[tuple[Sequence[Path], Sequence[Stimulus]]]
) -> Goal:
    """The goal by a metric's name; files that it mentions lie in the working folder.

    Raises `PolicyError` for a name that is no metric's, `FindError` for one that says nothing about
    some of the prompts, which come with the files they are from.
    """
    goal = Goal(name, make_metric(name, word_lists_of([name], Path.cwd())), sign)
    for paths, stimuli in prompts:
        if not any(goal.metric.applies(s) for s in stimuli if s.set == "target"):
            raise FindError(f"{_named(paths)}: {quote(name)} says nothing about a target prompt")
    return goal


def suggested(stimuli: Sequence[Stimulus]) -> str:
    """The metric that the target prompts' answers suggest: responses in the right language, or the
    first answer that is named. Raises `FindError` where they have none."""
    answers = next((s.answers for s in stimuli if s.set == "target" and s.answers), None)
    if not answers:
        raise FindError(
            "no target prompt has answers, so nothing says what to move: name a metric by "
            "--raise or --lower"
        )
    first = next(iter(answers))
    languages = {"en", *(code for s in stimuli for code in (s.answers or {}).get("language", ()))}
    if first == "language":
        return f"line_pass_rate:{','.join(sorted(languages))}"
    return f"answer_rate:{first}"


def _refuse_seen(train: Sequence[Stimulus], holdout: Sequence[Stimulus]) -> None:
    """An effect on prompts that chose the edit is not held out."""
    seen = {_input(stimulus): stimulus.id for stimulus in train if stimulus.set == "target"}
    for stimulus in holdout:
        if stimulus.set == "target" and _input(stimulus) in seen:
            raise FindError(
                f"holdout stimulus {quote(stimulus.id)} is training stimulus "
                f"{quote(seen[_input(stimulus)])} again; hold out other prompts"
            )


def _input(stimulus: Stimulus) -> Any:
    return stimulus.prompt or stimulus.input_ids


def _split(
    train: tuple[Stimulus, ...], holdout: tuple[Stimulus, ...], asked: Asked
) -> tuple[tuple[Stimulus, ...], Prompts]:
    """Prompts to score by, and the others. Where the user says how many candidates, all score."""
    wanted = tuple(stimulus for stimulus in holdout if stimulus.set == "target")
    if not wanted:
        raise FindError(f"{_named(asked.holdout)}: holds no stimulus of set target")
    preserve = preserved(holdout)
    own = [stimulus for stimulus in train if stimulus.set == "target"]
    count = 0 if asked.top is not None else len(own) // VALIDATION
    if not own or (asked.top is None and count < LEAST):
        raise FindError(
            f"{_named(asked.train)}: {len(own)} stimuli of set target; expected "
            f"{LEAST * VALIDATION} or more to choose how many candidates by, or --top"
        )
    order = np.random.default_rng(asked.seed).permutation(len(own))[:count]
    kept = {own[index].id for index in order.tolist()}
    scoring = tuple(stimulus for stimulus in train if stimulus.id not in kept)
    validation = tuple(stimulus for stimulus in own if stimulus.id in kept)
    return scoring, Prompts(validation, wanted, preserve)


def _named(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def preserved(stimuli: Sequence[Stimulus]) -> tuple[Stimulus, ...]:
    """Those of set preserve; plain text in many languages where there are none."""
    return tuple(stimulus for stimulus in stimuli if stimulus.set == "preserve") or _sentences()


def _sentences() -> tuple[Stimulus, ...]:
    lines = files("surgery.stimuli").joinpath("sentences.txt").read_text(encoding="utf-8")
    return tuple(
        Stimulus(f"sentence-{number}", "preserve", line)
        for number, line in enumerate(lines.splitlines())
    )


def _stamp(value: Any) -> str:
    """A name for an option; of files, and of those in a folder, with size and time."""
    if not (isinstance(value, Path) and value.exists()):
        return str(value)
    found = sorted(value.iterdir()) if value.is_dir() else [value]
    stats = [(path.name, path.stat()) for path in found]
    return f"{value.resolve()} {[(name, s.st_size, s.st_mtime_ns) for name, s in stats]}"
