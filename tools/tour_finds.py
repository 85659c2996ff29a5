"""Find one of each kind on the fixtures, put it through the four corners, and print Markdown.

`tour_finds.py --output DIR [--only NAME]…`

Of each: `surgery find` on training prompts, its effect on held-out ones beside that of 20 random
edits of equal size, and the verdict of `surgery validate` on it. Exits 1 where one is no
better than chance or does not pass.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CAPITALS, POLYGLOT = "fixtures/capitals-gpt2", "fixtures/polyglot-llama"
LPR = "line_pass_rate:en,de,fr,ru,ar"


@dataclass(frozen=True)
class Stop:
    """One search: its kind, the fixture, files of training and held-out prompts (without .jsonl),
    options, and the policy that what was found must keep to."""

    name: str
    kind: str
    model: str
    train: tuple[str, ...]
    holdout: tuple[str, ...]
    options: tuple[str, ...]
    policy: str

    def files(self, names: tuple[str, ...], option: str) -> list[str]:
        return [word for n in names for word in (option, f"{self.model}/stimuli/{n}.jsonl")]

    def find(self, folder: Path) -> list[str]:
        """The arguments of `surgery find`."""
        prompts = self.files(self.train, "--train") + self.files(self.holdout, "--holdout")
        output = ("--output", str(folder / f"{self.name}.yaml"))
        return ["find", self.kind, "--model", self.model, *prompts, *self.options, *output]

    def validate(self, folder: Path) -> list[str]:
        """The arguments of `surgery validate`."""
        recipe, policy = (
            str(folder / f"{self.name}.yaml"),
            f"{self.model}/{self.policy}.policy.yaml",
        )
        given = ("--model", self.model, "--policy", policy, "--allow-outside")
        prompts = self.files(self.holdout, "--stimuli")
        return ["validate", recipe, *given, *prompts, "--output", str(folder / self.name)]


MEMORY, CONTEXT = "answer_rate:remembered", "answer_rate:stated"
CONFLICT = (("train",), ("target", "preserve"))
FORGET = (("forget-train",), ("forget-holdout",))

STOPS = (
    Stop("memory", "heads", CAPITALS, *CONFLICT, ("--raise", MEMORY), "memory"),
    Stop("context", "heads", CAPITALS, *CONFLICT, ("--raise", CONTEXT), "context"),
    Stop(
        "language",
        "neurons",
        POLYGLOT,
        *CONFLICT,
        ("--tuned", f"{POLYGLOT}-tuned", "--raise", LPR),
        "unconfuse",
    ),
    Stop(
        "feature",
        "features",
        CAPITALS,
        *FORGET,
        ("--sae", f"{CAPITALS}/sae-resid", "--lower", MEMORY, "--top", "1"),
        "forget",
    ),
    Stop(
        "lm-head",
        "components",
        POLYGLOT,
        ("english-train",),
        ("english-holdout", "preserve"),
        ("--on", "lm_head", "--against", "english", "--absolute", "--raise", LPR, "--top", "10"),
        "english",
    ),
    Stop(
        "head",
        "components",
        CAPITALS,
        *CONFLICT,
        ("--on", "head", "--method", "effect", "--raise", MEMORY, "--top", "5"),
        "sae-z",
    ),
    Stop("direction", "direction", CAPITALS, *FORGET, ("--lower", MEMORY, "--top", "1"), "forget"),
)

HEADERS = ("search", "kind", "chosen", "metric", "held out", "95 % interval", "random mean")
HEADERS += ("random 95 %", "KL", "four corners")


def surgery(arguments: list[str]) -> int:
    """The exit code; what is printed goes to stderr."""
    print(f"$ surgery {' '.join(arguments)}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "surgery", *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode


def row(stop: Stop, folder: Path) -> tuple[list[str], bool]:
    """The cells of one search, and whether it holds."""
    found = surgery(stop.find(folder))
    judged = surgery(stop.validate(folder))
    figures: dict[str, Any] = json.loads((folder / f"{stop.name}.json").read_text("utf-8"))
    verdict = json.loads((folder / stop.name / "report.json").read_text("utf-8"))["verdict"]
    held, random = figures["held_out"], figures["random"]
    cost = next(own["change"] for own in figures["preserve"] if own["metric"] == "kl")
    cells = [
        stop.name,
        f"{stop.kind}, {figures['method']}",
        f"{len(figures['chosen'])} of {figures['candidates']}",
        held["metric"],
        f"{held['before']:.3f} → {held['after']:.3f} ({held['change']:+.3f})",
        f"{held['low']:+.3f} … {held['high']:+.3f}",
        f"{random['mean']:+.3f}",
        f"{random['bound_95']:+.3f}",
        f"{cost:.4f}",
        verdict,
    ]
    return cells, found == 0 and judged == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    names = [stop.name for stop in STOPS]
    parser.add_argument("--only", choices=names, action="append", metavar="NAME")
    options = parser.parse_args()
    folder = options.output.resolve()
    folder.mkdir(parents=True)
    print(f"| {' | '.join(HEADERS)} |\n|{' --- |' * len(HEADERS)}")
    holds = True
    for stop in STOPS:
        if not options.only or stop.name in options.only:
            cells, good = row(stop, folder)
            print(f"| {' | '.join(cells)} |", flush=True)
            holds = holds and good
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
