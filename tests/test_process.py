"""A child may hang, eat memory, crash or lie: the parent lives and says what happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from surgery.errors import CheckpointError, ExportError
from surgery.process import Ending, Limits, run

CHILD = "tests.children"


def end(folder: Path, do: str, limits: Limits | None = None, **arguments: object) -> Ending:
    return run(CHILD, {"do": do, **arguments}, folder, limits or Limits(60))


def test_a_child_answers_and_runs_apart_from_the_parents_terminal(tmp_path: Path) -> None:
    ending = end(tmp_path, "echo")
    assert (ending.status, ending.detail) == ("ok", "")
    assert ending.result == {"core": 0, "stdin": "", "session": True}
    assert 1 << 20 < ending.peak_bytes < 1 << 30


def test_a_native_crash_is_recorded_with_its_signal(tmp_path: Path) -> None:
    ending = end(tmp_path, "segfault")
    assert (ending.status, ending.detail) == ("crash", "killed by SIGSEGV")


def test_an_exit_without_an_answer_is_a_crash_and_quotes_the_last_line_safely(
    tmp_path: Path,
) -> None:
    ending = end(tmp_path, "exit", code=7)
    assert (ending.status, ending.detail) == ("crash", r"exit code 7: 'last words \x1b[31m'")


def test_a_stale_answer_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    assert end(tmp_path, "echo").status == "ok"
    assert end(tmp_path, "exit", code=0).status == "crash"


def test_4_tib_hit_the_memory_limit(tmp_path: Path) -> None:
    ending = end(tmp_path, "allocate", bytes=1 << 42)
    assert (ending.status, ending.error) == ("error", "MemoryError")


def test_the_memory_limit_is_the_one_given(tmp_path: Path) -> None:
    room = Limits(60, memory_bytes=256 << 20)
    assert end(tmp_path, "allocate", room, bytes=64 << 20).status == "ok"
    assert end(tmp_path, "allocate", room, bytes=512 << 20).error == "MemoryError"


def test_a_child_that_ignores_signals_is_killed_at_the_time_limit(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    ending = end(tmp_path, "ignore terminate and sleep", Limits(2.0), pid_file=str(file))
    assert ending.status == "timeout"
    assert "2 s" in ending.detail
    assert 2.0 <= ending.seconds < 10.0
    assert gone(int(file.read_text()))


def test_our_own_errors_come_back_as_themselves_on_one_safe_line(tmp_path: Path) -> None:
    ending = end(tmp_path, "refuse")
    assert (ending.status, ending.kind) == ("error", "input")
    with pytest.raises(CheckpointError) as caught:
        ending.value("job", ExportError)
    assert str(caught.value) == r"config.json: bad \x1b[31m\nname"


def test_other_errors_keep_their_class_and_last_line(tmp_path: Path) -> None:
    ending = end(tmp_path, "raise")
    assert (ending.status, ending.kind) == ("error", "")
    assert ending.detail == r"'RuntimeError: last \x1b[31m line'"
    with pytest.raises(ExportError, match="the job: error"):
        ending.value("the job", ExportError)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_child_dies_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    file = tmp_path / "pid"
    call = (
        "from pathlib import Path; from surgery.process import Limits, run; "
        f"run({CHILD!r}, {{'do': 'ignore terminate and sleep', 'pid_file': {str(file)!r}}}, "
        f"Path({str(tmp_path)!r}), Limits(60))"
    )
    parent = subprocess.Popen([sys.executable, "-c", call], stderr=subprocess.DEVNULL)
    wait_for(lambda: file.exists() and file.read_text() != "")
    parent.send_signal(number)
    parent.wait(20)
    child = int(file.read_text())
    wait_for(lambda: gone(child))


def wait_for(condition: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether no process `pid` runs; one that is dead but not yet reaped is gone too."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True
