"""One flipped bit anywhere in an output, or one file too many: `verify` names the file."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from recipes import HEADS, apply_edits

from surgery.checkpoint import RECEIPT
from surgery.verify import verify

FLIPS = 8
"""Of each file, at seeded positions; the first and the last bit besides."""


@pytest.fixture(scope="module")
def edited(base_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tampering")
    shutil.copytree(base_of("gpt2"), folder / "base")
    (folder / "base" / "sub").mkdir()
    (folder / "base" / "sub" / "vocab.txt").write_text("a\nb\n")
    return apply_edits(folder, folder / "base", [HEADS])


def named(edited: Path) -> list[str]:
    """The files that findings are about."""
    return [finding.site for finding in verify(edited).findings]


def test_a_flipped_bit_is_found_in_every_file_and_the_file_is_named(edited: Path) -> None:
    rng = random.Random(0)  # noqa: S311
    files = sorted(path for path in edited.rglob("*") if path.is_file())
    assert {path.relative_to(edited).as_posix() for path in files} > {RECEIPT, "sub/vocab.txt"}
    for path in files:
        data = path.read_bytes()
        bits = 8 * len(data)
        for bit in (0, bits - 1, *(rng.randrange(bits) for _ in range(FLIPS))):
            spoilt = bytearray(data)
            spoilt[bit // 8] ^= 1 << bit % 8
            path.write_bytes(spoilt)
            assert named(edited) == [path.relative_to(edited).as_posix()], bit
        path.write_bytes(data)
    assert named(edited) == []


@pytest.mark.parametrize("name", ["x", ".x", "sub/x", "sub/.x/y", "model.safetensors.bak"])
def test_a_file_too_many_is_named(name: str, edited: Path) -> None:
    path = edited / name
    made = not path.parent.exists()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    assert named(edited) == [name]
    path.unlink()
    if made:
        path.parent.rmdir()
    assert named(edited) == []
