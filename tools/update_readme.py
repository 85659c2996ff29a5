"""Run every `surgery` command of README.md in its order and put what it prints below it.

python tools/update_readme.py
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "fixtures").symlink_to(ROOT / "fixtures")
        text = BLOCK.sub(
            lambda block: refresh(block[1], Path(folder)), readme.read_text(encoding="utf-8")
        )
    readme.write_text(text, encoding="utf-8")


def refresh(block: str, folder: Path) -> str:
    """The block with fresh output; one that runs `make` is left alone."""
    commands = [line for line in block.splitlines() if line.startswith("$ ")]
    if not all(command.startswith("$ surgery ") for command in commands):
        return f"```console\n{block}```"
    shown = (f"{command}\n{run(command, folder)}" for command in commands)
    return f"```console\n{''.join(shown)}```"


def run(command: str, folder: Path) -> str:
    arguments = shlex.split(command)[2:]
    done = subprocess.run(
        [sys.executable, "-m", "surgery.cli", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


if __name__ == "__main__":
    main()
