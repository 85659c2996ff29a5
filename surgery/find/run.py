"""`surgery find` and `surgery sweep-strength`, from prompts to what is told of them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery.checkpoint.files import sha256_file
from surgery.errors import FindError
from surgery.find import FINDERS
from surgery.find.opening import (
    Asked,
    Progress,
    make_goal,
    make_lab,
    open_lab,
    preserved,
    suggested,
)
from surgery.find.outputs import Outputs
from surgery.find.recipes import Planner
from surgery.find.result import Found
from surgery.find.search import PRESERVE, TARGET, Search, cost_metrics
from surgery.find.sweep import Setting, Sweep, Sweeper
from surgery.find.trials import Trials
from surgery.recipe import load_recipe
from surgery.stimuli.prompts import load_stimuli


def silent(item: str, done: int, total: int) -> None:
    """The progress callback of those who do not want any."""


def find(
    kind: str,
    asked: Asked,
    output: Path,
    *,
    report: Path | None = None,
    method: str | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Found:
    """What to edit, as the recipe `output` with a CSV file, figures and tensors beside it.

    `options` are those of the kind's finder. Interrupted, the same call goes on where it stopped.
    The files are written whether or not the effect is above chance, and say so. Raises `FindError`
    or another `InputError` for anything that cannot be used.
    """
    finder_class = FINDERS[kind]
    methods = finder_class.methods
    chosen = method or methods[0]
    if chosen not in methods:
        raise FindError(f"--method {chosen}: {kind} are found by {', '.join(methods)}")
    finder = finder_class(method=chosen, **options)
    outputs = Outputs(output, report)
    folders = [asked.model, *(value for value in options.values() if isinstance(value, Path))]
    outputs.check(folder for folder in folders if folder.is_dir())
    lab, prompts = open_lab(asked, finder, outputs.tensors.name, progress)
    with tempfile.TemporaryDirectory(prefix="surgery-find-") as scratch:
        found = Search(finder, lab, prompts, Planner(lab, Path(scratch))).run(asked.top)
    outputs.write(found)
    lab.journal.close()
    return found


def sweep(
    recipe: Path,
    asked: Asked,
    settings: Sequence[Setting],
    *,
    allow_outside: bool = False,
    progress: Progress = silent,
) -> Sweep:
    """What the recipe does to the goal, and what it costs, at each setting, on the prompts
    `asked.holdout`. Raises `InputError` for anything that cannot be used."""
    stimuli = load_stimuli(asked.holdout)
    goal = make_goal(asked.goal or suggested(stimuli), asked.sign, [(asked.holdout, stimuli)])
    loaded = load_recipe(recipe, allow_outside=allow_outside)
    lab = make_lab(asked, (), goal, "", [sha256_file(path) for path in asked.holdout], progress)
    target = Trials.of(lab, stimuli, TARGET, {goal.name: goal.metric})
    kept = preserved(stimuli)
    preserve = Trials.of(lab, kept, PRESERVE, cost_metrics(goal))
    found = Sweeper(lab, loaded, target, preserve).run(settings)
    lab.journal.close()
    return found
