"""Without any network, not even the machine's own, everything local works."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from recipes import HEADS, write_recipe

CUT = ("unshare", "--map-root-user", "--net")


@pytest.fixture
def offline() -> Callable[..., str]:
    """Runs `surgery` in a network namespace of its own, which has none; its output."""
    if subprocess.run([*CUT, "true"], check=False, capture_output=True).returncode:
        pytest.skip("the kernel lets nobody cut the network here")

    def run(*arguments: object) -> str:
        argv = [*CUT, sys.executable, "-m", "surgery", *map(str, arguments)]
        done = subprocess.run(argv, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_weights_are_edited_checked_and_put_back(
    offline: Callable[..., str], base_of: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, base = write_recipe(tmp_path, [HEADS]), base_of("gpt2")
    edited, delta = tmp_path / "edited", tmp_path / "delta"
    offline("inspect", base)
    offline("plan", recipe, "--model", base)
    offline("apply", recipe, "--model", base, "--output", edited, "--delta", delta)
    offline("verify", edited, "--base", base)
    offline("revert", edited, "--delta", delta, "--output", tmp_path / "back")
    weights = "model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (base / weights).read_bytes()


@pytest.mark.campaign
def test_a_model_is_exported(
    offline: Callable[..., str], base_of: Callable[..., Path], tmp_path: Path
) -> None:
    offline("export", base_of("gpt2"), "--output", tmp_path / "onnx")
    assert (tmp_path / "onnx" / "model.onnx").exists()
