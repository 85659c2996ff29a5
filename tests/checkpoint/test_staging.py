"""An output folder appears whole or not at all, and never where something is."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from recipes import HEADS, NEURONS, apply_edits, snapshot, write_recipe

import surgery.checkpoint.staging
from surgery.apply import apply
from surgery.checkpoint import Staging
from surgery.errors import EnvironmentFault, InputError, OutputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o027])
def test_the_umask_is_honoured(mask: int, base_of: Callable[..., Path], tmp_path: Path) -> None:
    with umask(mask):
        output = apply_edits(tmp_path, base_of("gpt2"), [HEADS])
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in output.iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}
    assert stat.S_IMODE(output.stat().st_mode) == 0o777 & ~mask


def outputs(base: Path, folder: Path) -> dict[str, Path]:
    """Places no output may go to."""
    full, link, file = folder / "full", folder / "link", folder / "file"
    full.mkdir()
    (full / ".hidden").write_text("")
    link.symlink_to(folder / "nowhere")
    file.write_text("")
    (folder / "to-base").symlink_to(base)
    return {
        "the input": base,
        "inside the input": base / "deep" / "out",
        "inside the input by a link": folder / "to-base" / "out",
        "inside the input by ..": base / ".." / base.name / "out",
        "a folder that is not empty": full,
        "a link": link,
        "a link to the input": folder / "to-base",
        "a file": file,
        "below a file": file / "out",
    }


@pytest.mark.parametrize(
    "place",
    [
        "the input", "inside the input", "inside the input by a link", "inside the input by ..",
        "a folder that is not empty", "a link", "a link to the input", "a file", "below a file",
    ],
)  # fmt: skip
def test_an_occupied_place_is_refused_and_nothing_changes(
    place: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base, folder = base_of("gpt2"), tmp_path / "here"
    folder.mkdir()
    output = outputs(base, folder)[place]
    recipe = write_recipe(tmp_path, [HEADS])
    before, model = snapshot(folder), snapshot(base)
    with pytest.raises(OutputError, match="name another"):
        apply(recipe, base, output)
    assert snapshot(folder) == before
    assert snapshot(base) == model


def test_an_empty_folder_is_a_place(base_of: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (apply_edits(tmp_path, base_of("gpt2"), [HEADS]) / "config.json").exists()


def test_a_read_only_parent_is_refused(
    base_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*args: Any, **kwargs: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    recipe = write_recipe(tmp_path, [HEADS])
    monkeypatch.setattr(tempfile, "mkdtemp", denied)
    with pytest.raises(OutputError, match="Permission denied"):
        apply(recipe, base_of("gpt2"), tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_failing_apply_leaves_nothing_and_touches_nothing(
    dtype: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of("llama", dtype)
    before = snapshot(base)
    recipe = write_recipe(tmp_path / "recipe", [{**NEURONS, "factor": 1e300}])
    with pytest.raises(InputError, match="the edit turns"):
        apply(recipe, base, tmp_path / "made" / "deep" / "out")
    assert names(tmp_path) == ["recipe"]
    assert snapshot(base) == before


def test_a_successful_apply_does_not_touch_its_source(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of("llama")
    before = snapshot(base)
    apply_edits(tmp_path, base, [HEADS])
    assert snapshot(base) == before
    assert names(tmp_path) == ["out", "recipe.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_environment_fault_and_leaves_nothing(
    code: int, base_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(code, "full")

    recipe = write_recipe(tmp_path, [HEADS])
    monkeypatch.setattr(surgery.checkpoint.staging, "sync", full)
    with pytest.raises(EnvironmentFault, match="disk full"):
        apply(recipe, base_of("gpt2"), tmp_path / "out")
    assert names(tmp_path) == ["recipe.json"]


def test_what_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as staging:
        staging.write("who", b"ours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "who").write_bytes(b"theirs")
        with pytest.raises(OutputError, match="not empty"):
            staging.commit()
    assert (tmp_path / "out" / "who").read_bytes() == b"theirs"
    assert names(tmp_path) == ["out"]


def test_a_second_run_for_the_same_target_is_told_so(tmp_path: Path) -> None:
    with Staging(tmp_path / "out"):
        with pytest.raises(OutputError, match="another run"), Staging(tmp_path / "out"):
            pass
        with Staging(tmp_path / "other") as free:
            free.write("a", b"a")
            free.commit()
    with Staging(tmp_path / "out") as again:
        again.commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_what_a_killed_run_left_is_swept_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from surgery.checkpoint import Staging\n"
        "with Staging(Path(sys.argv[1])) as staging:\n"
        "    staging.write('half', b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    target = tmp_path / "out"
    subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    mine = tmp_path / ".out.notes.staging"
    mine.mkdir()
    assert len(list(tmp_path.iterdir())) == 2
    with Staging(target) as staging:
        staging.write("whole", b"whole")
        staging.commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "out"]
    assert [path.name for path in target.iterdir()] == ["whole"]
