"""What benchmarks print is what was measured, and a figure beyond its limit fails the run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from bench_diff import compare_memory, part  # noqa: E402
from bench_export import MIB, memory  # noqa: E402
from measuring import Failed, Run, run  # noqa: E402
from rows import Row, compare, interleave, table  # noqa: E402

CHILD = "import time; held = bytearray(250 << 20); time.sleep(1)"
PARENT = f"""
import subprocess, sys
held = bytearray(50 << 20)
subprocess.run([sys.executable, "-c", {CHILD!r}])
"""


def test_what_is_compared_takes_turns_and_every_other_round_goes_backwards() -> None:
    calls: list[str] = []
    measures = {name: lambda name=name: calls.append(name) for name in "ab"}
    interleave(3, measures)
    assert calls == ["a", "b", "b", "a", "a", "b"]


def test_a_ratio_is_of_medians_and_holds_up_to_its_limit() -> None:
    runs = {"a": [Run(s, 0) for s in (1.0, 3.0, 90.0)], "b": [Run(s, 0) for s in (2.0, 2.0, 0.1)]}
    assert compare("f", 1.5, runs, "a", "b").holds is True
    row = compare("f", 1.49, runs, "a", "b")
    assert row.holds is False
    assert "| f | ≤ 1.49 × | 1.50 × | **no** | a 3.00 s (1.00 to 90.00)" in str(row)


def test_the_peak_of_each_process_is_its_own() -> None:
    done = run([sys.executable, "-c", PARENT], each=True)
    [parent] = [peak for command, peak in done.peaks.items() if "subprocess" in command]
    [child] = [peak for command, peak in done.peaks.items() if f"-c {CHILD}" in command]
    assert 50 * MIB < parent < 100 * MIB
    assert 250 * MIB < child < 300 * MIB
    # What the kernel keeps starts at the memory of who forked, here pytest.
    assert done.peak > child - MIB


def test_only_the_load_check_does_not_count() -> None:
    peaks = {"python -m surgery export": 9 * MIB, "x /tmp/surgery-capture-1/job.json": 10 * MIB}
    loading = {"x /tmp/surgery-check-1/job.json": 99 * MIB}
    row = memory("f", 10, [Run(1.0, 0, {**peaks, **loading})])
    assert row.holds and row.measured == "10 MiB"
    assert not memory("f", 9, [Run(1.0, 0, peaks)]).holds


def test_memory_is_compared_by_medians_and_told_by_process() -> None:
    corner = "x /tmp/surgery-diff-1/T_o-float64/job.json"
    runs = {
        "diff": [Run(1.0, peak * MIB, {corner: 5 * MIB}) for peak in (5, 6, 90)],
        "optimum": [Run(1.0, 10 * MIB, {"y optimum": 10 * MIB})] * 3,
    }
    row = compare_memory("f", 0.6, runs, "diff", "optimum")
    assert row.holds and row.measured == "0.60 ×"
    assert row.detail == "diff 6 MiB (T_o-float64 5); optimum 10 MiB (parent 10)"
    assert not compare_memory("f", 0.59, runs, "diff", "optimum").holds
    assert part("x /tmp/surgery-check-1/job.json") == "check or capture"


def test_a_run_fails_with_one_row_or_a_command_that_fails(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(bench: None) -> list[Row]:
        raise Failed("it broke")

    rows = {
        "good": lambda bench: [Row("good", "", "", True, "")],
        "unlimited": lambda bench: [Row("unlimited", "", "", None, "")],
        "slow": lambda bench: [Row("slow", "", "", False, "")],
        "broken": fail,
    }
    ended: list[int] = []
    assert table(None, rows, ["good", "unlimited"], lambda: ended.append(1)) == 0
    assert table(None, rows, ["slow", "good"], lambda: ended.append(1)) == 1
    assert table(None, rows, ["broken", "good"], lambda: ended.append(1)) == 1
    assert len(ended) == 6
    assert "| broken |  | failed | **no** | 'it broke' |" in capsys.readouterr().out
