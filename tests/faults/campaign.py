"""Runs that write checkpoints, each met by one fault at one write-side system call after another.

The law, whatever the fault and wherever it comes: what a run reads is unchanged, what it writes
is there whole or not at all, and a process that lives to say so has cleaned up and told the
truth. What a killed one leaves is healed by the same command.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from recipes import HEADS, make_sae, sae_edit, write_recipe

from faults.tracing import Fault, Run, call, trace
from surgery import api, cli, console, revert, verify  # noqa: F401 (before the forks)
from surgery.checkpoint import RECEIPT

TOOLS = Path(__file__).resolve().parents[2] / "tools"
if str(TOOLS) not in sys.path:
    sys.path.insert(0, str(TOOLS))

from make_checkpoint import write_checkpoint  # noqa: E402

Contents = dict[str, str | None]
"""Every path below a folder: the SHA-256 of a file, None for a folder."""

VOLATILE = frozenset({RECEIPT, "delta"})
"""Files that say when others were written: no two runs write the same bytes."""

FAULTS: dict[str, Callable[[str, int], Fault]] = {
    **{
        name: partial(Fault, kill=signal.Signals[f"SIG{name}"])
        for name in ("KILL", "INT", "TERM", "HUP")
    },
    **{
        name: partial(Fault, errno=getattr(errno, name))
        for name in ("EIO", "ENOSPC", "EDQUOT", "EMFILE")
    },
}
SIGNAL_CODES = {"INT": 130, "TERM": 143, "HUP": 143}


def surgery(*arguments: object) -> Callable[[], int]:
    """The command line as a program for `trace`."""

    def program() -> int:
        sys.argv = ["surgery", *map(str, arguments)]
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return program


def contents(folder: Path) -> Contents:
    return {
        path.relative_to(folder).as_posix(): None if path.is_dir() else _sha256(path)
        for path in folder.rglob("*")
    }


def _sha256(path: Path) -> str:
    return "" if path.name in VOLATILE else hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Scenario:
    """A command: `arguments` with the folder it writes to, `products` what it makes there.

    `checks` are commands that succeed on what a finished run leaves; they may write `../back`.
    """

    name: str
    arguments: Callable[[Path], list[object]]
    products: tuple[str, ...]
    checks: Callable[[Path], list[list[object]]] = lambda folder: []


@dataclass
class Tally:
    """What came of the faults of one scenario; `broken` says where the law did not hold."""

    scenario: str
    fault: str
    calls: Counter[str]
    met: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


def make_inputs(folder: Path) -> Path:
    """Everything the scenarios read: a model whose layers lie between two shards of embeddings,
    each longer than a write buffer and not edited (asked for four, three get anything)."""
    base = folder / "base"
    sizes = {"width": 32, "heads": 4, "vocab": 20_000}
    write_checkpoint("llama", base, sizes, dtype="f32", shards=4, seed=0)
    (base / "sub").mkdir()
    for name in ("tokenizer.json", "sub/vocab.txt", "README.md"):
        (base / name).write_text(f"{name}\n")
    write_recipe(folder / "heads", [HEADS])
    make_sae(folder / "bias" / "sae", "blocks.1.hook_mlp_out", 32)
    write_recipe(folder / "bias", [sae_edit("steer_bias")])
    recipe, delta = folder / "heads" / "recipe.json", folder / "delta.safetensors"
    api.apply(recipe, base, folder / "edited", delta=delta)
    return folder


def scenarios(inputs: Path) -> list[Scenario]:
    base, heads, bias = inputs / "base", inputs / "heads/recipe.json", inputs / "bias/recipe.json"
    edited, delta = inputs / "edited", inputs / "delta.safetensors"
    apply = ["apply", heads, "--model", base, "--output"]

    def verified(folder: Path, *options: object, output: str = "out") -> list[list[object]]:
        return [["verify", folder / output, "--base", base, *options]]

    def reverted(folder: Path) -> list[list[object]]:
        return [["revert", folder / "out", "--delta", folder / "delta", "--output",
                 folder.parent / "back"]]  # fmt: skip

    return [
        Scenario(
            "apply",
            lambda folder: [*apply, folder / "new/out"],
            ("new/out",),
            lambda folder: verified(folder, output="new/out"),
        ),
        Scenario(
            "apply --delta",
            lambda folder: [*apply, folder / "out", "--delta", folder / "delta"],
            ("out", "delta"),
            lambda folder: verified(folder) + reverted(folder),
        ),
        Scenario("apply --link", lambda folder: [*apply, folder / "out", "--link"], ("out",),
                 verified),
        Scenario(
            "apply, tensors added",
            lambda folder: ["apply", bias, "--model", base, "--output", folder / "out"],
            ("out",),
            lambda folder: verified(folder, "--recipe", bias),
        ),
        Scenario(
            "apply DELTA",
            lambda folder: ["apply", delta, "--model", base, "--output", folder / "out"],
            ("out",),
            verified,
        ),
        Scenario(
            "revert",
            lambda folder: ["revert", edited, "--delta", delta, "--output", folder / "out"],
            ("out",),
        ),
    ]  # fmt: skip


class Campaign:
    """Meets the scenarios with faults in `folder`, which is this campaign's alone."""

    def __init__(self, folder: Path) -> None:
        self._inputs = make_inputs(folder / "inputs")
        self._before = contents(self._inputs)
        self._folder, self._log = folder / "here", folder / "log"
        self.scenarios = scenarios(self._inputs)

    def run(self, scenario: Scenario, fault: str = "KILL", sample: int | None = None) -> Tally:
        """Meets every write-side call, or `sample` of them spread over the run, with `fault`."""
        whole = self._whole(scenario)
        reference = contents(self._folder)
        tally = Tally(scenario.name, fault, Counter(whole.calls))
        for name, numbers in _points(whole.calls, sample).items():
            for number in numbers:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder.mkdir()
                run = self._trace(scenario, FAULTS[fault](name, number))
                if not run.met:  # past the last one
                    break
                tally.met[name] += 1
                for wrong in self._judge(scenario, fault, run, reference, tally):
                    where = f"{scenario.name}: {fault} at {name} {number}"
                    tally.broken.append(f"{where}: {wrong}")
        return tally

    def _whole(self, scenario: Scenario) -> Run:
        """A run that no fault meets: what the others are held against."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        run = self._trace(scenario, None)
        assert run.code == 0, run.said
        assert list(self._check(scenario)) == []
        return run

    def _judge(
        self, scenario: Scenario, fault: str, run: Run, reference: Contents, tally: Tally
    ) -> Iterator[str]:
        found = contents(self._folder)
        state = _state(scenario, found, reference)
        tally.states[state] += 1
        if contents(self._inputs) != self._before:
            yield "what is only read has changed"
        if state == "mixture":
            yield f"a mixture: {sorted(_visible(found))[:5]}"
        if state == "new":
            yield from self._check(scenario)
        if fault == "KILL" or state == "part":
            # A delta that could not be given its name waits beside its output for the rerun.
            yield from self._heal(scenario, state, reference)
        else:
            yield from _truth(fault, run, state, found, reference)

    def _heal(self, scenario: Scenario, state: str, reference: Contents) -> Iterator[str]:
        if state != "new":
            code, said = call(surgery(*scenario.arguments(self._folder)), self._log)
            if code != 0:
                yield f"unhealed: the rerun exits {code}: {said.strip()}"
            yield from self._check(scenario) if code == 0 else ()
        if contents(self._folder) != reference:
            yield "unhealed: not as an undisturbed run leaves it"

    def _check(self, scenario: Scenario) -> Iterator[str]:
        for arguments in scenario.checks(self._folder):
            code, said = call(surgery(*arguments), self._log)
            if code != 0:
                yield f"{arguments[0]} exits {code}: {said.strip()}"
        shutil.rmtree(self._folder.parent / "back", ignore_errors=True)

    def _trace(self, scenario: Scenario, fault: Fault | None) -> Run:
        return trace(surgery(*scenario.arguments(self._folder)), self._log, fault)


def _points(calls: list[str], sample: int | None) -> dict[str, Iterable[int]]:
    """Which calls to meet, by name: from the first on, or `sample` spread over the run."""
    if sample is None:
        return {name: count(1) for name in dict.fromkeys(calls)}
    chosen: dict[str, list[int]] = {}
    for place in sorted({(len(calls) - 1) * i // max(1, sample - 1) for i in range(sample)}):
        chosen.setdefault(calls[place], []).append(calls[: place + 1].count(calls[place]))
    return dict(chosen)


def _visible(found: Contents) -> set[str]:
    """What a run shows: hidden names beside the products are its own business until it ends."""
    return {path for path in found if not path.startswith(".") and "/." not in path}


def _state(scenario: Scenario, found: Contents, reference: Contents) -> str:
    """`new` with every product whole, `old` with none, `part` with some of them whole and the
    others absent; anything else is a mixture."""
    folders = {path.rpartition("/")[0] for path in scenario.products} - {""}
    parts = [
        {path for path in reference if path == product or path.startswith(f"{product}/")}
        for product in scenario.products
    ]
    there = [part for part in parts if part & {*found}]
    whole = all(found.get(path, "") == reference[path] for part in there for path in part)
    if not whole or not _visible(found) <= folders.union(*parts):
        return "mixture"
    return "new" if there == parts else "part" if there else "old"


def _truth(fault: str, run: Run, state: str, found: Contents, reference: Contents) -> Iterator[str]:
    """What a process that ended by itself may leave and say."""
    if found != (reference if state == "new" else {}):
        yield f"left behind: {sorted({*found} - {*(reference if state == 'new' else {})})[:5]}"
    allowed = {SIGNAL_CODES[fault]} if fault in SIGNAL_CODES else {3}
    if run.code not in allowed | ({0} if state == "new" else set()):
        yield f"exits {run.code}: {run.said.strip()}"
    if state == "new" and run.code and "nothing was written" in run.said:
        yield f"the output is there, yet: {run.said.strip()}"


def markdown(tallies: Iterable[Tally]) -> str:
    """What was counted, as tables, and every break of the law."""
    found = list(tallies)
    names = sorted({name for tally in found for name in tally.met})
    lines = [
        "| run | fault | calls | met | nothing there | all there | a part | mixtures | broken |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_row(tally) for tally in found),
        "",
        f"| call met | {' | '.join(f'{t.scenario}: {t.fault}' for t in found)} |",
        f"|---|{'---:|' * len(found)}",
        *(f"| {name} | {' | '.join(str(tally.met[name]) for tally in found)} |" for name in names),
    ]
    broken = [f"- {wrong}" for tally in found for wrong in tally.broken]
    return "\n".join([*lines, *([""] + broken if broken else [])])


def _row(tally: Tally) -> str:
    cells: list[Any] = [
        tally.scenario, tally.fault, tally.calls.total(), tally.met.total(), tally.states["old"],
        tally.states["new"], tally.states["part"], tally.states["mixture"], len(tally.broken),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"
