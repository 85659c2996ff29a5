"""Measure `surgery diff` against optimum's export and check, and streamed runs; print Markdown.

`bench_diff.py --work DIR [--optimum PYTHON] [--runs 3] [--only ROW]…`

The models are Llama 1.1 B bf16, with `torch.onnx.export`'s file of it, and for the row `large` one
of 8 B, made in DIR: 7 and 16 GB. The first stay there, the large one goes after its row. PYTHON is
one that has `optimum-onnx[onnxruntime]`; where none is named, an environment of its own is made in
DIR, of packages from the index. Peak memory is the greatest sum of what a command and all its
children have resident at one time, and that of the greatest process for itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench_export import MIB, Bench, warm_all
from measuring import Run, run
from rows import Row, compare, interleave, spread, surgery, table

# Nothing heavy is imported here, for the reason that tools/measuring.py gives.
OPTIMUM = ("optimum-onnx[onnxruntime]", "torch==2.13.0")
LARGE = "llama-8b"
STREAM_MIB = 1.2 * 1024


@dataclass(frozen=True)
class Diffs(Bench):
    """The bench of exports, and whose Python has optimum."""

    optimum: Path | None = None

    @property
    def python(self) -> Path:
        """A Python that has optimum; made where none is named."""
        if self.optimum is not None:
            return self.optimum
        folder = self.work / "optimum"
        python = folder / "bin" / "python"
        if not python.exists():
            run([sys.executable, "-m", "venv", str(folder)])
            run([str(python), "-m", "pip", "install", "--quiet", *OPTIMUM])
        return python

    def diff(self, model: Path, onnx: Path | None, *, stream: bool = False) -> Run:
        """One `surgery diff`; an ONNX file that is not given is exported first, as it would be."""
        report = self.work / "out-report.json"
        given = ("--onnx", onnx) if onnx else ()
        more = ("--stream",) if stream else ()
        command = surgery("diff", "--model", model, *given, *more, "--report", report)
        environment = {"SURGERY_CACHE": str(self.work / "cache")}
        return run(command, sample=True, each=True, environment=environment)

    def export_by_optimum(self) -> Run:
        """Optimum's export of the base, and its check of what it wrote."""
        target = self.work / "out-optimum"
        shutil.rmtree(target, ignore_errors=True)
        os.sync()
        own = ("--model", str(self.base), "--task", "text-generation", str(target))
        command = [str(self.python), "-m", "optimum.exporters.onnx", *own]
        return run(command, sample=True, each=True, environment={"HF_HUB_OFFLINE": "1"})


# ---------------------------------------------------------------------------------------- rows


def row_pair(bench: Diffs) -> list[Row]:
    onnx, python = bench.standard, bench.python
    warm_all(bench.base, onnx.parent, python.parent)
    runs = interleave(
        bench.runs,
        {"diff": lambda: bench.diff(bench.base, onnx), "optimum": bench.export_by_optimum},
    )
    figure = "`surgery diff` of a given file against optimum's export and check"
    return [
        compare(figure, 0.5, runs, "diff", "optimum"),
        compare_memory(f"{figure}, peak memory of all processes", 0.6, runs, "diff", "optimum"),
    ]


def row_stream(bench: Diffs) -> list[Row]:
    onnx = bench.standard
    warm_all(bench.base, onnx.parent)
    return streamed(bench, bench.base, onnx, "`surgery diff --stream`, Llama 1.1 B", STREAM_MIB)


def row_large(bench: Diffs) -> list[Row]:
    model = bench.model(LARGE)
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB
        return streamed(bench, model, None, "`surgery diff --stream`, Llama 8 B, linked", memory)
    finally:
        shutil.rmtree(model)


def streamed(bench: Diffs, model: Path, onnx: Path | None, figure: str, limit: float) -> list[Row]:
    runs = [bench.diff(model, onnx, stream=True) for _ in range(bench.runs)]
    seconds = [done.seconds for done in runs]
    peak = max(done.peak for done in runs) / MIB
    return [
        Row(figure, "", f"{statistics.median(seconds):.1f} s", None, spread(seconds)),
        Row(
            f"{figure}, peak memory of all processes",
            f"≤ {limit:.0f} MiB",
            f"{peak:.0f} MiB",
            peak <= limit,
            by_process(runs),
        ),
    ]


def compare_memory(
    figure: str, limit: float, runs: dict[str, list[Run]], ours: str, other: str
) -> Row:
    """The ratio of the medians of the peaks of `ours` and `other`."""
    peaks = {name: statistics.median(done.peak for done in runs[name]) for name in (ours, other)}
    ratio = peaks[ours] / peaks[other]
    detail = "; ".join(
        f"{name} {peak / MIB:.0f} MiB ({by_process(runs[name])})" for name, peak in peaks.items()
    )
    return Row(figure, f"≤ {limit:g} ×", f"{ratio:.2f} ×", ratio <= limit, detail)


def by_process(runs: list[Run]) -> str:
    """The greatest peak of each kind of process."""
    peaks: dict[str, float] = {}
    for done in runs:
        for command, peak in done.peaks.items():
            peaks[part(command)] = max(peaks.get(part(command), 0.0), peak / MIB)
    return ", ".join(f"{name} {peak:.0f}" for name, peak in peaks.items())


def part(command: str) -> str:
    """What a process does: a corner, by the folder it works in, or the command itself."""
    words = command.split()
    folder = next((Path(word).parent.name for word in words if word.endswith("/job.json")), "")
    named = folder.partition("-")[0] if folder.startswith("surgery-") else folder
    return named.replace("surgery", "check or capture") or "parent"


ROWS: dict[str, Callable[[Diffs], list[Row]]] = {
    "pair": row_pair,
    "stream": row_stream,
    "large": row_large,
}


# ---------------------------------------------------------------------------------------- main


def clear(work: Path) -> None:
    for output in work.glob("out-*"):
        shutil.rmtree(output) if output.is_dir() else output.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and outputs")
    parser.add_argument("--optimum", type=Path, metavar="PYTHON", help="one that has optimum")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--only", choices=ROWS, action="append", metavar="ROW", help=", ".join(ROWS)
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Diffs(options.work.resolve(), options.runs, options.optimum)
    print(f"`{' '.join(['bench_diff.py', *sys.argv[1:]])}`")
    print(f"{os.cpu_count()} cores, {options.runs} runs in turn, medians\n")
    return table(bench, ROWS, options.only or ROWS, lambda: clear(bench.work))


if __name__ == "__main__":
    sys.exit(main())
