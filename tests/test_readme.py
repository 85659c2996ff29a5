"""Every command of the README runs, in its order, on a copy of what a clone holds."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.removeprefix("$ ").split(" #")[0].strip()
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ")
]


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"`?make ([\w-]+)", README)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_surgery_command_of_the_readme_runs(tmp_path: Path) -> None:
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    tour = [shlex.split(command) for command in COMMANDS if command.startswith("surgery ")]
    assert len(tour) >= 8
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in tour:
        done = subprocess.run(
            [sys.executable, "-m", "surgery.cli", *command[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)


def test_the_table_of_commands_is_complete() -> None:
    from surgery.cli import cli

    listed = set(re.findall(r"^\| `surgery ([\w-]+)", README, re.MULTILINE))
    assert listed == set(cli.commands)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_every_link_of_the_readme_leads_to_a_file(link: str) -> None:
    assert (ROOT / link).exists()


def test_the_recipe_of_the_readme_is_valid(tmp_path: Path) -> None:
    from surgery.edits import OPS
    from surgery.recipe import parse_recipe

    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert {edit.op for edit in parse_recipe(text, "README.md", tmp_path).edits} == set(OPS)


def test_the_families_of_the_readme_are_those_described() -> None:
    from surgery.arch import FAMILIES

    (listed,) = re.findall(r"`model_type` of their config: ([\w,\s]+)\.", README)
    assert sorted(re.split(r",\s+", listed)) == sorted(FAMILIES)
