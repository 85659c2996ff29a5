"""What docs/finding.md says each search found is found again, beyond chance, and passes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.campaign
def test_every_search_of_the_tour_is_above_chance_and_passes_the_four_corners(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "tools/tour_finds.py", "--output", str(tmp_path / "tour")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = (ROOT / "docs" / "finding.md").read_text(encoding="utf-8").splitlines()
    found = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(found) == 9 and all(line in told for line in found)
