"""Modes come from the umask, owner and times from the run; nothing is taken from the source."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from recipes import HEADS, write_recipe


@pytest.mark.parametrize("mask", [0o077, 0o022])
def test_what_is_written_is_the_users_own_as_the_umask_says(
    mask: int, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base, began = tmp_path / "base", time.time()
    shutil.copytree(base_of("gpt2"), base)
    (base / "sub").mkdir()
    (base / "sub" / "vocab.txt").write_text("a")
    for path in base.rglob("*.*"):
        path.chmod(0o444)
        os.utime(path, (0, 0))
    recipe, here = write_recipe(tmp_path, [HEADS]), tmp_path / "here"
    argv = [sys.executable, "-m", "surgery", "apply", recipe, "--model", base,
            "--output", here / "made" / "out", "--delta", here / "delta"]  # fmt: skip
    here.mkdir()
    subprocess.run(list(map(str, argv)), check=True, capture_output=True, umask=mask)
    written = list(here.rglob("*"))
    assert len(written) > 8
    for path in written:
        found = path.stat()
        everyone = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(found.st_mode) == everyone & ~mask, path
        assert (found.st_uid, found.st_nlink > 0) == (os.geteuid(), True)
        assert began - 2 <= found.st_mtime <= time.time() + 2, path
