"""The doctor names what will not do, and is well itself without any of what it looks for."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from surgery import doctor, process
from surgery.process import Ending

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def rows() -> dict[str, doctor.Row]:
    return {row.name: row for row in doctor.examine().rows}


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    ending = Ending("ok", "", 0.0, 1, result={"refused": True})
    monkeypatch.setattr(process, "run", lambda *given: ending)


def test_a_machine_that_runs_these_tests_is_well() -> None:
    found = doctor.examine()
    assert found.ok, [row for row in found.rows if row.status == "fail"]
    assert {row.status for row in found.rows} <= {"ok", "warn"}
    assert all(row.remedy for row in found.rows if row.status != "ok")


@pytest.mark.usefixtures("no_child")
def test_every_package_of_the_project_is_looked_at_and_every_floor_is_declared() -> None:
    names = {text.partition(">=")[0] for text in PROJECT["dependencies"]}
    assert names <= set(rows())
    declared = dict(text.split(">=") for text in PROJECT["dependencies"])
    for name, (floor, _) in doctor.FLOORS.items():
        assert Version(declared[name]) >= Version(floor), "pip itself would take an unsafe one"


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("name", doctor.FLOORS)
def test_a_version_below_its_floor_fails_and_says_the_way_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {name: "0.0.9"}
    monkeypatch.setattr(doctor, "version", lambda asked: old.get(asked) or version(asked))
    found = rows()
    assert [row.name for row in found.values() if row.status == "fail"] == [name]
    assert f"pip install '{name}>=" in found[name].remedy
    assert "older ones" in found[name].remedy


@pytest.mark.usefixtures("no_child")
def test_a_missing_package_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", missing)
    found = rows()
    assert {found[name].found for name in doctor.FLOORS} == {"not installed"}
    monkeypatch.setattr(doctor, "requires", missing)
    monkeypatch.setattr(doctor, "metadata", missing)
    assert {row.name for row in rows().values() if row.status == "fail"} == set(doctor.FLOORS)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.sampled_from(["", "rc1", "+cpu"]))
def test_releases_are_ordered_as_packages_order_them(numbers: list[int], tail: str) -> None:
    text = ".".join(map(str, numbers))
    assert doctor.release(f"{text}{tail}") == Version(f"{text}{tail}").release


# ------------------------------------------------------------------------------------- machine


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("probe", doctor.PROBES)
def test_a_file_system_that_cannot_says_so(probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    needed, remedy, _ = doctor.PROBES[probe]
    monkeypatch.setitem(doctor.PROBES, probe, (needed, remedy, refuse))
    row = rows()[f"temporary folder: {probe}"]
    assert (row.status, row.remedy) == ("fail" if needed else "warn", remedy)


def test_a_child_that_is_not_limited_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for ending in (
        Ending("ok", "", 0.0, 1, result={"refused": False}),
        Ending("crash", "killed by SIGKILL", 0.0, 1),
    ):
        monkeypatch.setattr(process, "run", lambda *given, ending=ending: ending)
        assert rows()["child processes with limits"].status == "fail"


@pytest.mark.usefixtures("no_child")
def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert str(tmp_path) in rows()["cache folder"].found
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------- command line


def surgery(*arguments: str, blocked: tuple[str, ...] = (), **environment: str) -> Any:
    """The command where `blocked` packages cannot be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); sys.argv[0] = 'surgery'; "
        "from surgery.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_it_runs_where_nothing_else_could() -> None:
    blocked = ("torch", "onnx", "onnxruntime", "numpy", "pydantic", "rich", "transformers")
    done = surgery("doctor", "--json", blocked=blocked)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["ok"] and {row["status"] for row in found["rows"]} <= {"ok", "warn"}


def test_where_nothing_can_be_written_it_cannot_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    with pytest.raises((FileNotFoundError, PermissionError)):
        doctor.examine()


def test_a_failure_is_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from surgery.cli import cli

    bad = doctor.Diagnosis((doctor.Row("onnx", "fail", "1.0", "pip install 'onnx>=1.21'"),))
    monkeypatch.setattr(doctor, "examine", lambda: bad)
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == 1
    assert "pip install 'onnx>=1.21'" in done.output and "1 failure" in done.output
