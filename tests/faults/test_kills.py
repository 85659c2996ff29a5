"""A fault at any system call of a run: the old state or the new one, and a rerun heals.

The campaigns run in a process of their own, without threads, since they fork.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from faults import tracing

pytestmark = pytest.mark.skipif(not tracing.supported, reason="ptrace as on x86-64 Linux")

TOOL = Path(__file__).resolve().parents[2] / "tools" / "kill_campaign.py"
SIGNALS, ERRORS = ("INT", "TERM", "HUP"), ("EIO", "ENOSPC", "EDQUOT", "EMFILE")


def campaign(*options: str, before: str = "") -> tuple[int, str]:
    """Exit code and output of the tool, `before` being run first in its process."""
    code = f"{before}\nimport runpy\nrunpy.run_path({str(TOOL)!r}, run_name='__main__')"
    argv = [sys.executable, "-c", code, *options]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout


def test_a_sample_of_kills_leaves_no_mixture_and_is_healed() -> None:
    code, printed = campaign("--sample", "2")
    assert code == 0, printed


def test_a_sample_of_signals_and_errors_leaves_nothing() -> None:
    faults = [f"--fault={fault}" for fault in (*SIGNALS, *ERRORS)]
    code, printed = campaign(*faults, "--run", "apply", "--sample", "4")
    assert code == 0, printed


@pytest.mark.campaign
@pytest.mark.parametrize("fault", ["KILL", *SIGNALS, *ERRORS])
def test_every_call_of_every_run(fault: str) -> None:
    code, printed = campaign("--fault", fault)
    assert code == 0, printed


HASTY = """
from surgery.checkpoint.staging import Staging
enter = Staging.__enter__
def hasty(self):
    enter(self)
    self.path.rmdir()
    self.target.mkdir()
    self.path = self.target
    return self
Staging.__enter__, Staging.commit = hasty, lambda self: None
Staging.__exit__ = lambda self, *_: self._lock.release()
"""
"""Writes in place."""

FORGETFUL = """
from surgery.checkpoint.staging import Staging
Staging._sweep = lambda self: None
"""
"""Leaves what a killed run left."""


@pytest.mark.parametrize(
    ("mutant", "said"),
    [(HASTY, "a mixture"), (FORGETFUL, "unhealed")],
    ids=["writes in place", "sweeps nothing"],
)
def test_a_writer_that_breaks_the_law_is_caught(mutant: str, said: str) -> None:
    code, printed = campaign("--run", "apply", "--sample", "5", before=mutant)
    assert code == 1
    assert re.search(f"KILL at .*: {said}", printed)
