"""What the atheris harnesses share: one loop, one law about errors, findings kept and counted.

A harness gives a function from bytes to "accepted" or "refused"; whatever else it raises is a
finding. A finding does not end the run: a few inputs are kept per place of failure, so that an
hour of fuzzing names every weak place and not only the first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Check = Callable[[bytes], str]
Mutate = Callable[[bytes, int, int], bytes]

MAX_MESSAGE = 20_000
"""Characters of one error message: twenty problems, each with a bounded place and value."""
KEPT_PER_PLACE = 10
"""Inputs kept for one place of failure: one law can be broken in more ways than one."""
STATS_EVERY = 5.0


class Violation(Exception):
    """An input broke a law that no exception of the code under test says."""


def check_message(error: Exception) -> str:
    """The law about errors: one printable line of bounded length. Returns "refused"."""
    message = str(error)
    if not message or not message.isprintable():
        raise Violation(f"message is not one printable line: {message[:200]!r}")
    if len(message) > MAX_MESSAGE:
        raise Violation(f"message of {len(message)} characters")
    return "refused"


@dataclass
class Fuzzer:
    """Runs `check`, bounded in CPU time per input; keeps findings and counts in `folder`."""

    check: Check
    folder: Path
    max_cpu: float
    seconds: float
    outcomes: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    started: float = field(default_factory=time.monotonic)
    written: float = 0.0

    def one_input(self, data: bytes) -> None:
        begin = time.process_time()
        try:
            self.outcomes[self.check(data)] += 1
            self._check_time(time.process_time() - begin)
        except Exception as error:
            self._keep(data, error)
        if time.monotonic() - self.written > STATS_EVERY:
            self.write_stats()
            if self.written - self.started > self.seconds:
                self._end()

    def _end(self) -> None:
        # libFuzzer leaves with _exit(), after which nothing of Python's runs; so do we.
        print((self.folder / "stats.json").read_text(), end="", flush=True)
        os._exit(1 if self.places else 0)

    def _check_time(self, seconds: float) -> None:
        self.slowest = max(self.slowest, seconds)
        if seconds > self.max_cpu:
            raise Violation(f"took more than {self.max_cpu} s of CPU time")

    def _keep(self, data: bytes, error: Exception) -> None:
        self.outcomes["finding"] += 1
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__}@{Path(frame.filename).name}:{frame.lineno}"
        self.places[place] += 1
        if self.places[place] > KEPT_PER_PLACE:
            return
        name = f"finding-{hashlib.sha256(data).hexdigest()[:12]}"
        (self.folder / name).write_bytes(data)
        text = "".join(traceback.format_exception(error))
        (self.folder / f"{name}.txt").write_text(text, "utf-8", errors="backslashreplace")
        print(f"FINDING {place}: {ascii(str(error))[:300]} -> {name}", file=sys.stderr, flush=True)

    def write_stats(self) -> None:
        """The counts as `stats.json`, there to read while the run goes on."""
        self.written = time.monotonic()
        stats = {
            "seconds": round(self.written - self.started, 1),
            "executions": self.outcomes.total(),
            **self.outcomes,
            "places of findings": dict(self.places),
            "slowest input, CPU s": round(self.slowest, 3),
        }
        (self.folder / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")


def arguments(description: str) -> argparse.Namespace:
    """`CORPUS --seconds N [--findings DIR]`; both folders are made where they are not there."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("corpus", type=Path, help="folder of inputs; grows with what is new")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--findings", type=Path, help="default: CORPUS-findings")
    options = parser.parse_args()
    options.findings = options.findings or options.corpus.with_name(
        f"{options.corpus.name}-findings"
    )
    for folder in (options.corpus, options.findings):
        folder.mkdir(parents=True, exist_ok=True)
    return options


def seed(corpus: Path, inputs: Iterable[bytes]) -> None:
    """Writes each input under its digest: a second run adds nothing."""
    for data in inputs:
        (corpus / hashlib.sha256(data).hexdigest()[:40]).write_bytes(data)


def fuzz(
    atheris: Any,
    check: Check,
    options: argparse.Namespace,
    *,
    max_cpu: float,
    max_len: int,
    words: Iterable[str] = (),
    mutate: Mutate | None = None,
) -> None:
    """Runs libFuzzer for `options.seconds` and exits: 1 if anything was found, else 0."""
    fuzzer = Fuzzer(check, options.findings, max_cpu, options.seconds)
    dictionary = options.findings / "words.dict"
    dictionary.write_text("".join(f'"{_escaped(word)}"\n' for word in words))
    flags = [
        f"-max_len={max_len}",
        f"-dict={dictionary}",
        f"-artifact_prefix={options.findings}/",
        "-timeout=60",
        "-rss_limit_mb=2048",
    ]
    more = {} if mutate is None else {"custom_mutator": mutate}
    atheris.Setup([sys.argv[0], *flags, str(options.corpus)], fuzzer.one_input, **more)
    atheris.Fuzz()


def _escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word.encode())
