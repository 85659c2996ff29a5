"""Two runs, one output: one wins, the other says so."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from recipes import HEADS, snapshot, write_recipe

from surgery.verify import verify

PATIENT = """
import sys
from pathlib import Path
from surgery.apply import apply
def wait(file, done, of):
    if done == of:
        print("writing", flush=True)
        sys.stdin.read()
apply(*map(Path, sys.argv[1:]), progress=wait)
"""
"""Stops before its last byte until its input ends."""


def start(*argv: object) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, *map(str, argv)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_the_second_run_says_that_another_one_is_writing(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, base, output = write_recipe(tmp_path, [HEADS]), base_of("gpt2"), tmp_path / "out"
    first = start("-c", PATIENT, recipe, base, output)
    assert first.stdout is not None
    assert first.stdout.readline() == "writing\n"
    second = start("-m", "surgery", "apply", recipe, "--model", base, "--output", output)
    _, said = second.communicate()
    assert (second.returncode, output.exists()) == (2, False)
    assert f"{output}: another run is writing it; name another output" in said
    first.communicate()
    assert first.returncode == 0
    assert verify(output, base).findings == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.json"]


def test_of_many_at_once_one_wins(base_of: Callable[..., Path], tmp_path: Path) -> None:
    recipe, base, output = write_recipe(tmp_path, [HEADS]), base_of("gpt2"), tmp_path / "out"
    before = snapshot(base)
    command = ("-m", "surgery", "apply", recipe, "--model", base, "--output", output)
    runs = [start(*command) for _ in range(4)]
    said = [run.communicate()[1] for run in runs]
    assert Counter(run.returncode for run in runs) == {0: 1, 2: 3}
    for run, line in zip(runs, said, strict=True):
        assert run.returncode == 0 or "another run" in line or "exists and is not empty" in line
    assert verify(output, base).findings == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.json"]
    assert snapshot(base) == before
