"""Where a report may be written: never over an input, nor into a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from surgery.checkpoint import RECEIPT
from surgery.checkpoint.staging import refuse_inside
from surgery.errors import OutputError

HEADS = (
    b'{\n  "schema": 1,\n  "verdict": ',
    b'{\n  "kind": "sweep-strength",\n',
    b"PASS: ",
    b"FAIL: ",
    b"NOT EVALUATED: ",
    b"# PASS: ",
    b"# FAIL: ",
    b"# NOT EVALUATED: ",
    b'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    b'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; ',
)
"""How every format of a report begins."""


def check_place(
    target: Path, inputs: Iterable[Path], folders: Iterable[Path] | None = None
) -> None:
    """Raises `OutputError` where writing `target` could harm anything but an older report.

    `inputs` are the files and `folders` the checkpoints that are only read; where nobody says
    which folders those are, what looks like one is. A file that is there already must be empty or
    begin as a report of ours does.
    """
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise OutputError(f"{target}: must name a file in a folder that exists")
    for folder in folders or ():
        refuse_inside(target, folder)
    for source in inputs:
        if _same(target, source):
            raise OutputError(f"{target}: is {source}, which is only read; name another file")
    if folders is None:
        _refuse_checkpoint(target)
    if target.exists() and not _is_report(target):
        raise OutputError(f"{target}: exists and is not a report; name another file")


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve() or (a.exists() and b.exists() and a.samefile(b))


def _refuse_checkpoint(target: Path) -> None:
    """A receipt speaks for everything below its folder, a configuration for its own folder."""
    real = target.resolve()
    described = [folder for folder in real.parents if (folder / RECEIPT).exists()]
    if (real.parent / "config.json").exists():
        described.append(real.parent)
    if described:
        raise OutputError(f"{target}: lies in the checkpoint {described[0]}; name another folder")


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(max(map(len, HEADS)))
    return not head or head.startswith(HEADS)
