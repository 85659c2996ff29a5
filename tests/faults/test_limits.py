"""Limits of the machine that are really there: small disks, few descriptors."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from recipes import HEADS, snapshot, write_recipe

from surgery.apply import apply

MOUNT = """
mount -t tmpfs -o "$1" none "$2" || exit 99
cd "$2" && shift 2
"$@" 2>&1
echo "exit $?, left: $(ls -A)"
"""


def on_a_small_disk(options: str, folder: Path, *arguments: object) -> str:
    """Runs `surgery` in a fresh tmpfs of its own; what it said, how it ended and what it left."""
    folder.mkdir()
    argv = ["unshare", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh", options, folder,
            sys.executable, "-m", "surgery", *arguments]  # fmt: skip
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, check=False)
    if done.returncode in (1, 99) and "exit" not in done.stdout:
        pytest.skip(f"the kernel lets nobody mount here: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture
def base(base_of: Callable[..., Path], tmp_path: Path) -> Path:
    """A model with many tiny files, each of which takes a page and an inode."""
    folder = tmp_path / "base"
    shutil.copytree(base_of("gpt2"), folder)
    for number in range(60):
        (folder / f"{number}.txt").write_text("x")
    return folder


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_too_small_a_disk_is_refused_with_what_is_needed_and_what_is_there(
    base: Path, tmp_path: Path
) -> None:
    recipe, before = write_recipe(tmp_path, [HEADS]), snapshot(base)
    said = on_a_small_disk(
        "size=64k", tmp_path / "disk", "apply", recipe, "--model", base, "--output", "out"
    )
    found = re.search(r"out: needs (\d+) bytes, (\d+) are free; nothing was written", said)
    assert found, said
    assert int(found[1]) >= weight_bytes(base)
    assert int(found[2]) == 64 << 10
    assert "exit 3, left: \n" in said
    assert snapshot(base) == before


def test_a_disk_that_fills_up_on_the_way_says_what_was_there(base: Path, tmp_path: Path) -> None:
    """The tiny files take more of the disk than they have bytes."""
    recipe, size = write_recipe(tmp_path, [HEADS]), (weight_bytes(base) + 65536) // 4096 * 4096
    said = on_a_small_disk(
        f"size={size}", tmp_path / "disk", "apply", recipe, "--model", base, "--output", "out"
    )
    assert "disk full" in said
    assert "exit 3, left: \n" in said


def test_a_disk_without_inodes_says_so(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, [HEADS])
    options = "size=64m,nr_inodes=20"
    said = on_a_small_disk(
        options, tmp_path / "disk", "apply", recipe, "--model", base, "--output", "out"
    )
    assert "exit 3, left: \n" in said
    assert re.search(r"error: \S*/out: .*\b(inodes|files)\b", said), said


def test_a_revert_checks_the_space_it_needs(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, [HEADS])
    edited, delta = tmp_path / "edited", tmp_path / "delta"
    apply(recipe, base, edited, delta=delta)
    said = on_a_small_disk(
        "size=64k", tmp_path / "disk", "revert", edited, "--delta", delta, "--output", "out"
    )
    assert re.search(r"out: needs \d+ bytes, \d+ are free; nothing was written", said), said
    assert "exit 3, left: \n" in said


DESCRIPTORS = """
import os, resource, sys
from pathlib import Path
from surgery import api, cli, console
recipe, base, output = sys.argv[1:]
sys.argv = ["surgery", "apply", recipe, "--model", base, "--output", output]
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
for spare in range(12):
    used = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, hard))
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print("#", code, sorted(path.name for path in Path(output).parent.iterdir()))
    if code == 0:
        break
"""


def test_too_few_descriptors_are_an_environment_fault(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, base = write_recipe(tmp_path / "recipe", [HEADS]), base_of("gpt2")
    here = tmp_path / "here"
    here.mkdir()
    argv = [sys.executable, "-c", DESCRIPTORS, recipe, base, here / "out"]
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *few, enough = [line for line in done.stdout.splitlines() if line.startswith("#")]
    assert enough == "# 0 ['out']"
    assert len(few) >= 3
    assert set(few) == {"# 3 []"}
    assert done.stderr.count("surgery: error: ") == len(done.stderr.splitlines()) == len(few)
