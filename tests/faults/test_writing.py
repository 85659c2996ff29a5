"""Whatever happens while an output is written: it is there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from recipes import HEADS, snapshot, write_recipe

from surgery.apply import apply
from surgery.errors import CheckpointError, EnvironmentFault

PROGRAM = """
import resource, sys
from pathlib import Path
from surgery.apply import apply
from surgery.errors import SurgeryError
recipe, base, output, limit = sys.argv[1:]
if limit != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    apply(Path(recipe), Path(base), Path(output))
except SurgeryError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def run(folder: Path, base: Path, limit: int = 0) -> tuple[int, str]:
    """Applies a recipe to `folder/out` in a process of its own; exit code and what it said."""
    recipe = write_recipe(folder, [HEADS])
    command = [sys.executable, "-c", PROGRAM, recipe, base, folder / "out", str(limit)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def left(folder: Path) -> list[str]:
    return sorted({path.name for path in folder.iterdir()} - {"recipe.json"})


def test_a_file_size_limit_is_an_environment_fault_and_leaves_nothing(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    code, said = run(tmp_path, base_of("gpt2"), limit=10_000)
    assert (code, left(tmp_path)) == (3, [])
    assert "File too large" in said


@pytest.mark.parametrize("call", ["fsync", "write", "pwrite", "close"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE])
def test_a_failing_call_is_an_environment_fault_and_leaves_nothing(
    call: str,
    code: int,
    base_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(tmp_path, [HEADS])
    before = snapshot(base_of("gpt2"))

    def fail(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    def fail_to_close(descriptor: int) -> None:
        writing = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
        close(descriptor)
        if writing:
            fail()

    close = os.close
    if call == "write":
        monkeypatch.setattr("surgery.checkpoint.staging.Staging.write", fail)
    elif call == "close":
        monkeypatch.setattr(os, "close", fail_to_close)
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(EnvironmentFault, match="nothing was written"):
        apply(recipe, base_of("gpt2"), tmp_path / "out")
    monkeypatch.undo()
    assert left(tmp_path) == []
    assert snapshot(base_of("gpt2")) == before


def test_an_interrupt_leaves_nothing(base_of: Callable[..., Path], tmp_path: Path) -> None:
    def interrupt(tensor: str, done: int, of: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    recipe = write_recipe(tmp_path, [HEADS])
    with pytest.raises(KeyboardInterrupt):
        apply(recipe, base_of("gpt2"), tmp_path / "out", progress=interrupt)
    assert left(tmp_path) == []


@pytest.mark.parametrize("left_over", [0, 1000, 400_000])
def test_a_base_cut_short_while_it_is_edited_is_bad_input_and_leaves_nothing(
    left_over: int, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_of("llama", hidden_size=128), base)
    weights = base / "model.safetensors"
    assert weights.stat().st_size > 500_000

    def cut(file: str, done: int, of: int) -> None:
        os.truncate(weights, left_over)

    recipe = write_recipe(tmp_path / "recipe", [HEADS])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated at byte"):
        apply(recipe, base, tmp_path / "out", progress=cut)
    assert left(tmp_path) == ["base", "recipe"]
