"""Open thousands of damaged checkpoints: `mutate_headers.py [--count 5000] [MODEL...]`.

The real headers of MODELs (the fixtures by default) get one to three mutations each. Every file
is judged as in tools/header_files.py, and opened as a model folder, index and all, where only an
`InputError` of one printable line may come out. One in `--command-every` also goes through the
command line in a process of its own. Prints the counts; exits 1 unless there are no crashes, no
wrong accepts and no tracebacks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fuzzing import Violation, check_message
from header_files import MUTATIONS, HeaderFile, judge

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.checkpoint.header import read_header
from surgery.errors import CheckpointError, InputError

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
NAME = "model.safetensors"


@dataclass
class Campaign:
    """Judges files one by one; `bad` counts what must not be, `shown` names the first of each."""

    folder: Path
    outcomes: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    shown: list[str] = field(default_factory=list)

    def reader(self, file: HeaderFile) -> None:
        """The header reader alone, against the reference library."""
        self._count("reader", lambda: judge(read_header, CheckpointError, file))

    def model(self, file: HeaderFile, config: Path) -> None:
        """A folder with this file for weights, opened and identified."""
        self._place(file, config)
        self._count("folder", self._open)

    def command(self, file: HeaderFile, config: Path) -> None:
        """`surgery inspect` of that folder: exit 0 or 2, and one line on stderr with the latter."""
        self._place(file, config)
        argv = [sys.executable, "-m", "surgery.cli", "inspect", str(self.folder)]
        done = subprocess.run(argv, capture_output=True, check=False, timeout=120)
        error = done.stderr.decode(errors="backslashreplace").strip()
        if done.returncode < 0:
            self._bad("crash", f"signal {-done.returncode}")
        elif "Traceback" in error or done.returncode not in (0, 2):
            self._bad("traceback", f"exit {done.returncode}: {error}")
        elif done.returncode == 2 and not error.isprintable():
            self._bad("traceback", f"more than one line: {error!r}")
        self.outcomes[f"command: exit {done.returncode}"] += 1

    def _place(self, file: HeaderFile, config: Path) -> None:
        shutil.copy(config, self.folder / "config.json")
        with (self.folder / NAME).open("wb") as output:
            output.write(file.head)
            output.truncate(file.size)

    def _open(self) -> str:
        try:
            identify(Checkpoint.open(self.folder))
        except InputError as error:
            return check_message(error)
        return "accepted"

    def _count(self, what: str, judged: Callable[[], str]) -> None:
        try:
            self.outcomes[f"{what}: {judged()}"] += 1
        except Violation as error:
            self._bad("wrong accept" if "wrong accept" in str(error) else "message", str(error))
        except Exception as error:
            self._bad("traceback", f"{type(error).__name__}: {error}")

    def _bad(self, kind: str, detail: str) -> None:
        self.bad[kind] += 1
        if self.bad[kind] <= 5:
            kept = Path(tempfile.gettempdir()) / f"mutated-{os.getpid()}-{len(self.shown)}"
            shutil.copytree(self.folder, kept)
            self.shown.append(f"{kind}: {ascii(detail)[:300]}; kept in {kept}")

    @property
    def failed(self) -> bool:
        return self.bad.total() > 0

    def summary(self) -> str:
        counts = {"crash": 0, "wrong accept": 0, "traceback": 0, "message": 0, **self.bad}
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.kinds.items()))
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        bad = ", ".join(f"{count} x {kind}" for kind, count in counts.items())
        return "\n".join([f"mutations: {kinds}", f"outcomes: {outcomes}", bad, *self.shown])


def sources(models: list[Path]) -> list[tuple[HeaderFile, Path]]:
    """Every shard's header of every model, and that model's config."""
    found = [(HeaderFile.read(path), path.parent / "config.json")
             for model in models for path in sorted(model.glob("*.safetensors"))]  # fmt: skip
    # A shard of many is no model of its own, so its folder is refused even undamaged; the model
    # as one file is what the folder's checks see the inside of.
    merged = [(merge(model), model / "config.json") for model in models]
    return found + merged


def merge(model: Path) -> HeaderFile:
    """The header that `model` would have as a single file."""
    entries, position = {}, 0
    for path in sorted(model.glob("*.safetensors")):
        shard = HeaderFile.read(path)
        for name, entry in json.loads(shard.raw).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                moved = [begin + position, end + position]
                entries[name] = {**entry, "data_offsets": moved}
        position += shard.data
    return HeaderFile(0, b"", position).text(json.dumps(entries, separators=(",", ":")).encode())


def run(models: list[Path], count: int, every: int, seed: int, folder: Path) -> Campaign:
    """`count` mutated headers, the same ones for the same `seed`."""
    rng, campaign = random.Random(seed), Campaign(folder)
    originals = sources(models)
    for file, _ in originals:
        assert judge(read_header, CheckpointError, file) == "accepted", "an undamaged header"
    for number in range(count):
        file, config = rng.choice(originals)
        for kind in rng.choices(list(MUTATIONS), k=rng.choice((1, 1, 1, 2, 3))):
            campaign.kinds[kind] += 1
            file = MUTATIONS[kind](file, rng)
        campaign.reader(file)
        campaign.model(file, config)
        if every and number % every == 0:
            campaign.command(file, config)
    return campaign


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*", metavar="MODEL")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--command-every", type=int, default=50, metavar="N", help="0: never")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = [path.parent for path in sorted(FIXTURES.glob("*/config.json"))]
    with tempfile.TemporaryDirectory() as folder:
        campaign = run(
            options.models or found,
            options.count,
            options.command_every,
            options.seed,
            Path(folder),
        )
    print(f"{options.count} mutated headers, seed {options.seed}")
    print(campaign.summary())
    return int(campaign.failed)


if __name__ == "__main__":
    sys.exit(main())
