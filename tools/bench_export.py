"""Measure exports against `torch.onnx.export`, and what they give in ONNX Runtime; print Markdown.

`bench_export.py --work DIR [--runs 3] [--only ROW]…`

What is compared are fresh processes in turn (A B B A …), and each ratio is of two medians of one
run. The model is Llama 1.1 B bf16 in four shards, made in DIR and kept there, as are the standard
export it is compared with and an edited copy: 11 GB. Peak memory is the kernel's figure for each
process. Two sessions that are compared are both loaded first and then run in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from measuring import Failed, Run, run, warm
from rows import Row, compare, interleave, offers, spread, surgery, table

# Nothing heavy is imported here, for the reason that tools/measuring.py gives.
TOOLS = Path(__file__).resolve().parent
MIB = 1 << 20
MODEL = "model.onnx"
LINKED = (MODEL, "lineage.json", "surgery-export.json")
EDIT = "schema: 1\nedits:\n  - {op: neurons, neurons: [L11N17], factor: 0.0}\n"
DEEP = 80
SHALLOW = 2

STANDARD = """
import sys, torch, transformers
source, target = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
ids = torch.arange(16).reshape(2, 8)
inputs = {
    "input_ids": ids,
    "attention_mask": torch.ones_like(ids),
    "position_ids": torch.arange(8).expand(2, 8).contiguous(),
}
free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
with torch.no_grad():
    torch.onnx.export(
        model, (), target, kwargs={**inputs, "use_cache": False}, dynamo=True,
        external_data=True, dynamic_shapes={**dict.fromkeys(inputs, free), "use_cache": None},
        input_names=list(inputs), output_names=["logits"],
    )
"""

CAPTURE = """
import sys
from pathlib import Path
from surgery.export.graphs import Wanted, captured
_, cached = captured(Wanted(Path(sys.argv[1]), "causal-lm", 20, "float32"))
assert not cached
"""

SESSION = """
import json, sys, time
import numpy as np, onnxruntime
onnxruntime.set_default_logger_severity(3)
begin = time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
seconds = time.perf_counter() - begin
[peak] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(json.dumps({"seconds": seconds, "peak": int(peak.split()[1]) << 10}), flush=True)
for line in sys.stdin:
    ids = np.arange(int(line))[None]
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids}
    fed = {value.name: known[value.name] for value in session.get_inputs()}
    begin = time.perf_counter()
    session.run(None, fed)
    print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)
"""
"""Loads a model, and runs a prefill of as many tokens as each line of its input says."""

READ = """
import os, sys
buffer = bytearray(8 << 20)
for path in sys.argv[1:]:
    file, offset = os.open(path, os.O_RDONLY), 0
    while count := os.preadv(file, [buffer], offset):
        offset += count
"""


@dataclass(frozen=True)
class Bench:
    """Where things are, and how often each is run."""

    work: Path
    runs: int

    def model(self, name: str, *sizes: str) -> Path:
        """The Llama of that name; made of `sizes` (or that preset) where it is not there."""
        path = self.work / name
        if not path.exists():
            tool = str(TOOLS / "make_checkpoint.py")
            run([sys.executable, tool, "llama", str(path), *(sizes or ("--preset", name))])
        return path

    @property
    def base(self) -> Path:
        return self.model("llama-1.1b")

    @property
    def edited(self) -> Path:
        """The base with one neuron less."""
        path, recipe = self.work / "edited", self.work / "recipe.yaml"
        if not path.exists():
            recipe.write_text(EDIT)
            run(surgery("apply", recipe, "--model", self.base, "--output", path))
        return path

    @property
    def standard(self) -> Path:
        """The base as `torch.onnx.export` exports it."""
        path = self.work / "standard" / MODEL
        if not path.exists():
            export_standard(self.base, path)
        return path

    @property
    def linked(self) -> Path:
        """The base's linked graph, exported anew."""
        remove_linked(self.base)
        self.run(surgery("export", self.base, "--layout", "linked"))
        return self.base / MODEL

    def run(self, command: list[str], *, empty: bool = False, each: bool = False) -> Run:
        """Runs a command with the bench's cache of captured graphs, or with an empty one."""
        cache = self.work / ("out-cache" if empty else "cache")
        if empty:
            shutil.rmtree(cache, ignore_errors=True)
        return run(command, each=each, environment={"SURGERY_CACHE": str(cache)})


def export_standard(model: Path, file: Path) -> Run:
    shutil.rmtree(file.parent, ignore_errors=True)
    file.parent.mkdir()
    os.sync()
    return run([sys.executable, "-c", STANDARD, str(model), str(file)])


def export_portable(bench: Bench, target: Path) -> Run:
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    command = surgery("export", bench.base, "--layout", "portable", "--output", target)
    return bench.run(command, empty=True, each=True)


def export_linked(bench: Bench, model: Path, *, empty: bool) -> Run:
    remove_linked(model)
    return bench.run(surgery("export", model, "--layout", "linked"), empty=empty, each=True)


def remove_linked(model: Path) -> None:
    for name in LINKED:
        (model / name).unlink(missing_ok=True)


class Session:
    """A fresh process that has loaded a model; `load` is how long that took, and its memory."""

    def __init__(self, file: Path) -> None:
        command = [sys.executable, "-c", SESSION, str(file)]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        said = self._answer()
        self.load = Run(float(said["seconds"]), int(said["peak"]))

    def prefill(self, tokens: int) -> Run:
        assert self._child.stdin
        self._child.stdin.write(f"{tokens}\n")
        self._child.stdin.flush()
        return Run(float(self._answer()["seconds"]), 0)

    def end(self) -> None:
        self._child.communicate()

    def _answer(self) -> dict[str, float]:
        assert self._child.stdout
        line = self._child.stdout.readline()
        if not line:
            raise Failed(f"an ONNX Runtime session ended with exit {self._child.wait()}")
        return dict(json.loads(line))


def load(file: Path) -> Run:
    session = Session(file)
    session.end()
    return session.load


# ---------------------------------------------------------------------------------------- rows


def row_first(bench: Bench) -> list[Row]:
    target = bench.work / "standard" / MODEL
    runs = interleave(
        bench.runs,
        {
            "linked": lambda: export_linked(bench, bench.base, empty=True),
            "torch.onnx.export": lambda: export_standard(bench.base, target),
        },
    )
    size = sum((bench.base / name).stat().st_size for name in LINKED)
    figure = "first linked export against `torch.onnx.export`"
    return [
        compare(figure, 0.35, runs, "linked", "torch.onnx.export"),
        memory(f"{figure}, peak of each process", 700, runs["linked"]),
        Row(f"{figure}, disk", "≤ 2 MB", f"{size / 1e6:.2f} MB", size <= 2e6, ", ".join(LINKED)),
    ]


def row_layers(bench: Bench) -> list[Row]:
    def measure(layers: int) -> Run:
        sizes = ("--layers", str(layers), "--width", "256", "--heads", "8", "--mlp-width", "512")
        model = bench.model(f"layers-{layers}", *sizes)
        return bench.run([sys.executable, "-c", CAPTURE, str(model)], empty=True)

    deep, shallow = f"{DEEP} layers", f"{SHALLOW} layers"
    runs = interleave(bench.runs, {deep: lambda: measure(DEEP), shallow: lambda: measure(SHALLOW)})
    return [compare("capture of a graph by its layers", 2, runs, deep, shallow)]


def row_second(bench: Bench) -> list[Row]:
    edited = bench.edited
    export_linked(bench, bench.base, empty=False)
    runs = [export_linked(bench, edited, empty=False) for _ in range(bench.runs)]
    seconds = [done.seconds for done in runs]
    median = statistics.median(seconds)
    figure = "linked export of a second edit, graph cached, start-up included"
    return [
        Row(figure, "≤ 2 s", f"{median:.2f} s", median <= 2, spread(seconds)),
        memory(f"{figure}, peak of each process", 350, runs),
    ]


def row_load(bench: Bench) -> list[Row]:
    linked, standard = bench.linked, bench.standard
    warm_all(linked.parent, standard.parent)
    runs = interleave(
        bench.runs, {"linked": lambda: load(linked), "standard": lambda: load(standard)}
    )
    peaks = {name: statistics.median(done.peak for done in found) for name, found in runs.items()}
    ratio = peaks["linked"] / peaks["standard"]
    detail = "; ".join(f"{name} {peak / MIB:.0f} MiB" for name, peak in peaks.items())
    figure = "ONNX Runtime's load of a linked graph against a standard export's"
    return [
        compare(figure, 1.5, runs, "linked", "standard"),
        Row(f"{figure}, peak memory", "≤ 1.2 ×", f"{ratio:.2f} ×", ratio <= 1.2, detail),
    ]


def row_run(bench: Bench) -> list[Row]:
    linked, standard = Session(bench.linked), Session(bench.standard)
    rows = []
    for tokens, more in ((64, 3), (512, 1)):
        for session in (linked, standard):
            session.prefill(tokens)
        runs = interleave(
            more * bench.runs,
            {
                "linked": lambda n=tokens: linked.prefill(n),
                "standard": lambda n=tokens: standard.prefill(n),
            },
        )
        figure = f"its prefill of {tokens} tokens, linked against standard"
        rows.append(compare(figure, 1.05, runs, "linked", "standard"))
    for session in (linked, standard):
        session.end()
    return rows


def row_portable(bench: Bench) -> list[Row]:
    target = bench.work / "standard" / MODEL
    runs = interleave(
        bench.runs,
        {
            "portable": lambda: export_portable(bench, bench.work / "out-portable"),
            "torch.onnx.export": lambda: export_standard(bench.base, target),
        },
    )
    figure = "portable export against `torch.onnx.export`"
    return [
        compare(figure, 0.6, runs, "portable", "torch.onnx.export"),
        memory(f"{figure}, peak of each process but the load check", 1536, runs["portable"]),
    ]


def row_lineage(bench: Bench) -> list[Row]:
    figure = "`surgery lineage` against reading both files"
    if not offers("lineage"):
        return [Row(figure, "≤ 2 ×", "not there yet", None, "")]
    standard = bench.standard
    command = surgery("lineage", "--model", bench.base, "--onnx", standard)
    files = [*sorted(bench.base.glob("*.safetensors")), *sorted(standard.parent.iterdir())]
    warm_all(bench.base, standard.parent)
    runs = interleave(
        bench.runs,
        {
            "lineage": lambda: bench.run(command),
            "read": lambda: bench.run([sys.executable, "-c", READ, *map(str, files)]),
        },
    )
    return [
        compare(figure, 2, runs, "lineage", "read"),
        memory(f"{figure}, peak of each process", 600, [bench.run(command, each=True)]),
    ]


def memory(figure: str, limit: int, runs: list[Run]) -> Row:
    """The greatest peak of any process of `runs`, but of the one that opens a session to check."""
    peaks: dict[str, list[float]] = {}
    for done in runs:
        for command, peak in done.peaks.items():
            peaks.setdefault(part(command), []).append(peak / MIB)
    peaks.pop("check", None)
    worst = max(max(found) for found in peaks.values())
    detail = "; ".join(f"{name} {max(found):.0f} MiB" for name, found in peaks.items())
    return Row(figure, f"≤ {limit} MiB", f"{worst:.0f} MiB", worst <= limit, detail)


def part(command: str) -> str:
    """What a process of an export does, by the folder its work is given in."""
    for name in ("capture", "check"):
        if f"surgery-{name}-" in command:
            return name
    return "parent"


def warm_all(*folders: Path) -> None:
    for path in (file for folder in folders for file in folder.iterdir() if file.is_file()):
        warm(path)


ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    "first": row_first,
    "layers": row_layers,
    "second": row_second,
    "load": row_load,
    "run": row_run,
    "portable": row_portable,
    "lineage": row_lineage,
}


# ---------------------------------------------------------------------------------------- main


def clear(work: Path) -> None:
    for output in work.glob("out-*"):
        shutil.rmtree(output)
    for model in ("llama-1.1b", "edited"):
        remove_linked(work / model)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and outputs")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--only", choices=ROWS, action="append", metavar="ROW", help=", ".join(ROWS)
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.work.resolve(), options.runs)
    print(f"`{' '.join(['bench_export.py', *sys.argv[1:]])}`")
    print(f"{os.cpu_count()} cores, {options.runs} runs in turn, medians\n")
    return table(bench, ROWS, options.only or ROWS, lambda: clear(bench.work))


if __name__ == "__main__":
    sys.exit(main())
