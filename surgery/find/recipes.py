"""Proposals as recipes: on disk for people, and planted in the live model."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.editor import Editor
from surgery.find.interface import Lab, Proposal
from surgery.plan import Plan, make_plan
from surgery.recipe import load_recipe


def recipe_text(proposal: Proposal, folder: Path | None, heading: Sequence[str] = ()) -> str:
    """The recipe as YAML, one edit to a line; places on disk relative to `folder`, where it will
    lie, or absolute; `heading` becomes comment lines."""
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    document = CommentedMap(schema=1)
    for flag in ("untie", "allow_overlap"):
        if getattr(proposal, flag):
            document[flag] = True
    document["edits"] = CommentedSeq()
    for entry in proposal.entries:
        row = CommentedMap((key, _placed(value, folder)) for key, value in entry.items())
        row.fa.set_flow_style()
        document["edits"].append(row)
    yaml = YAML()
    yaml.width = 1 << 20
    text = io.StringIO()
    yaml.dump(document, text)
    return "".join(f"# {line}\n" for line in heading) + text.getvalue()


def _placed(value: Any, folder: Path | None) -> Any:
    if not isinstance(value, Path):
        return value
    return (value.absolute() if folder is None else Path(os.path.relpath(value, folder))).as_posix()


def save_tensors(proposal: Proposal, path: Path) -> None:
    """Writes what the recipe reads beside itself, if it reads anything."""
    if proposal.tensors:
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(a) for name, a in proposal.tensors.items()}, path)


@dataclass(frozen=True)
class Planner:
    """Plans proposals as the recipes they will be, in folders of `scratch`."""

    lab: Lab
    scratch: Path

    def plan(self, proposal: Proposal) -> Plan:
        """Raises the `InputError` that applying the recipe would."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        path = folder / "recipe.yaml"
        path.write_text(recipe_text(proposal, None), encoding="utf-8")
        save_tensors(proposal, folder / self.lab.tensors)
        return make_plan(load_recipe(path, allow_outside=True), self.lab.checkpoint)


@contextmanager
def planted(lab: Lab, plan: Plan) -> Iterator[None]:
    """While entered, the live model is as the plan would leave it: each edit acts through its own
    hook."""
    editor = Editor(plan)
    with ExitStack() as stack:
        for number, edit in enumerate(plan.edits):
            stack.enter_context(edit.hook(lab.live, plan.arch, editor.state(number)))
        yield
