"""Measure `find heads` against the loop one would write with hooks; print Markdown.

`bench_find.py --work DIR [--budget 768] [--every 1] [--only ROW]…`

The model has GPT-2 small's shape and random weights; 64 prompts of 32 random tokens, two watched
tokens each. The loop is exact path patching too: a hooked forward of all prompts with full logits
for each of the 144 heads, the other heads held; its effects must be ours within 1e-4. Each way runs
once, in a process of its own, caching passes counted and loading left out. With `--every N` the
loop does every Nth head, and what the others would take is added in proportion.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import run
from rows import Row, table

# Nothing heavy is imported here, for the reason that tools/measuring.py gives.
TOOLS = Path(__file__).resolve().parent
MIB = 1 << 20
SIZES = {"layers": 12, "width": 768, "heads": 12, "mlp-width": 3072, "vocab": 50257,
         "positions": 1024}  # fmt: skip
LIMITS = {"path": 30, "direct": 50, "gradient": 50}
TOLERANCE = 1e-4
SMALL_BUDGET = 16


@dataclass(frozen=True)
class Timed:
    """Effects [layers, heads, prompts, 2], NaN where not computed, seconds, and peak bytes."""

    effects: Any
    seconds: float
    peak: int


@dataclass(frozen=True)
class Finds:
    work: Path
    budget: int
    every: int

    @property
    def model(self) -> Path:
        path = self.work / "gpt2-small"
        if not path.exists():
            sizes = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
            tool = str(TOOLS / "make_checkpoint.py")
            run([sys.executable, tool, "gpt2", str(path), "--dtype", "f32", *sizes])
        return path

    def time(self, way: str, budget: int) -> Timed:
        import numpy as np

        out = self.work / f"out-{way}.npz"
        tool, options = str(TOOLS / "time_heads.py"), ["--budget", str(budget)]
        options += ["--every", str(self.every)]
        done = run([sys.executable, tool, str(self.model), way, str(out), *options])
        with np.load(out) as kept:
            return Timed(kept["effects"], float(kept["seconds"]), done.peak)


def row_effects(bench: Finds) -> list[Row]:
    """Every way against the loop, whether exact ones are equal, and how far the others agree."""
    loop = bench.time("loop", bench.budget)
    ways = {way: bench.time(way, bench.budget) for way in (*LIMITS, "all")}
    heads = SIZES["layers"] * SIZES["heads"]
    seconds = loop.seconds * heads / len(range(0, heads, bench.every))
    rows = [equality(way, ways[way], loop) for way in ("path", "all")]
    rows += [speed(way, own, seconds, LIMITS.get(way)) for way, own in ways.items()]
    return [*rows, *agreements(ways)]


def speed(way: str, own: Timed, loop: float, limit: float | None) -> Row:
    ratio = loop / own.seconds
    figure = "path, exchanged at all positions" if way == "all" else way
    return Row(
        f"{figure}, {SIZES['layers'] * SIZES['heads']} heads, against the loop",
        "" if limit is None else f"≥ {limit:g} ×",
        f"{ratio:.1f} ×",
        None if limit is None else ratio >= limit,
        f"{own.seconds:.2f} s; loop {loop:.1f} s",
    )


def equality(way: str, own: Timed, loop: Timed) -> Row:
    """NaN of ours fails; of the loop's, at least one head must have been done."""
    import numpy as np

    done = ~np.isnan(loop.effects).any(axis=(2, 3))
    worst = np.abs(own.effects[done] - loop.effects[done]).max()
    greatest = np.abs(loop.effects[done]).max()
    return Row(
        f"{way}: greatest difference to the loop, {done.sum()} heads",
        f"≤ {TOLERANCE:g}",
        f"{worst:.1e}",
        bool(worst <= TOLERANCE < greatest / 10),
        f"logits; the greatest effect is {greatest:.2g}",
    )


def agreements(ways: dict[str, Timed]) -> list[Row]:
    from surgery.find.scores.agreement import rank_correlation

    scores = {way: scored(own.effects) for way, own in ways.items()}
    pairs = (("path", "direct"), ("path", "gradient"), ("direct", "gradient"))
    return [
        Row(
            f"Spearman rank correlation, {one} and {other}",
            "",
            f"{rank_correlation(scores[one], scores[other]):.3f}",
            None,
            "mean effect on one token less that on the other",
        )
        for one, other in pairs
    ]


def scored(effects: Any) -> Any:
    """Each head's score: mean over the prompts of the one token's effect less the other's."""
    return (effects[..., 0] - effects[..., 1]).mean(axis=2, dtype="float64").ravel()


def row_memory(bench: Finds) -> list[Row]:
    """Peak memory follows the budget."""
    small, wide = (bench.time("path", budget) for budget in (SMALL_BUDGET, bench.budget))
    return [
        Row(
            f"path, peak memory at a budget of {SMALL_BUDGET} and {bench.budget} rows",
            "the first is less",
            f"{small.peak / MIB:.0f} and {wide.peak / MIB:.0f} MiB",
            small.peak < wide.peak,
            f"{small.seconds:.2f} and {wide.seconds:.2f} s",
        )
    ]


ROWS: dict[str, Callable[[Finds], list[Row]]] = {"effects": row_effects, "memory": row_memory}


def clear(work: Path) -> None:
    for output in work.glob("out-*"):
        output.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for model and outputs")
    parser.add_argument("--budget", type=int, default=768, help="rows that run at once")
    parser.add_argument("--every", type=int, default=1, help="the loop does every Nth head")
    parser.add_argument(
        "--only", choices=ROWS, action="append", metavar="ROW", help=", ".join(ROWS)
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Finds(options.work.resolve(), options.budget, options.every)
    print(f"`{' '.join(['bench_find.py', *sys.argv[1:]])}`")
    print(f"{os.cpu_count()} cores, one run\n")
    return table(bench, ROWS, options.only or ROWS, lambda: clear(bench.work))


if __name__ == "__main__":
    sys.exit(main())
