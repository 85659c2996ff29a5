"""Whatever happens while an output is written: it is there whole or not at all."""

from __future__ import annotations

import errno
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
from surgery.errors import EnvironmentFault
from surgery.verify import verify

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


def run(
    folder: Path, base: Path, limit: int = 0, *, under: tuple[str, ...] = ()
) -> tuple[int, str]:
    """Applies a recipe to `folder/out` in a process of its own; exit code and what it said."""
    recipe = write_recipe(folder, [HEADS])
    command = [*under, sys.executable, "-c", PROGRAM, recipe, base, folder / "out", str(limit)]
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


@pytest.mark.parametrize("call", ["fsync", "write", "pwrite"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EMFILE])
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

    if call == "write":
        monkeypatch.setattr("surgery.checkpoint.staging.Staging.write", fail)
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


KILLS = [
    *(("fsync", n) for n in (1, 3, 6)),
    ("rename", 1),
    ("pwrite64", 1),
]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace injects the kill")
@pytest.mark.parametrize(("call", "number"), KILLS)
def test_a_kill_leaves_the_old_state_or_the_new_one_and_a_rerun_heals(
    call: str, number: int, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    kill = f"inject={call}:signal=KILL:when={number}"
    under = ("strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}", "-e", kill)
    code, _ = run(tmp_path, base_of("gpt2"), under=under)
    assert code != 0
    if (tmp_path / "out").exists():
        assert verify(tmp_path / "out", base_of("gpt2")).findings == ()
    else:
        assert run(tmp_path, base_of("gpt2"))[0] == 0
        assert verify(tmp_path / "out", base_of("gpt2")).findings == ()
