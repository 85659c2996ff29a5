"""Measure the checkpoint engine against `cp`, transformers and `sha256sum`; print Markdown.

`bench_checkpoint.py --work DIR [--model DIR] [--large DIR] [--huge DIR] [--runs 5] [--only ROW]…`

What is compared runs in turn (A B A B …, every other round backwards) and each ratio is of two
medians of one run; before each measurement earlier output is removed and synced away. With
`--cache warm` every input byte is read beforehand, with `--cache cold` it is dropped from the page
cache. Peak memory is the kernel's figure for the child, or, where it is more, the sum over the
child and its descendants, sampled. Models that are not given are made in DIR and kept there.
"""

from __future__ import annotations

import argparse
import array
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from measuring import Run, cool, run, warm, weight_bytes_read
from rows import Row, compare, interleave, offers, spread, surgery, table

# Nothing heavy is imported here, for the reason that tools/measuring.py gives.
TOOLS = Path(__file__).resolve().parent
MIB = 1 << 20
INDEX = "model.safetensors.index.json"
RECEIPT = "surgery-receipt.json"

LOAD_EDIT_SAVE = """
import sys, torch, transformers
source, target, layer, *columns = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
with torch.no_grad():
    model.model.layers[int(layer)].mlp.down_proj.weight[:, [int(c) for c in columns]] = 0
model.save_pretrained(target)
"""


@dataclass
class Bench:
    """Where things are, and how often each is run."""

    work: Path
    runs: int
    cache: str
    models: dict[str, Path]
    _recipes: dict[tuple[Path, str], Path] = field(default_factory=dict)

    def model(self, size: str) -> Path:
        """The checkpoint of that size; made where none was given and none is there."""
        path = self.models.get(size, self.work / size)
        if not path.exists():
            tool = str(TOOLS / "make_checkpoint.py")
            run([sys.executable, tool, "llama", str(path), "--preset", size])
        return path

    def output(self, name: str) -> Path:
        return self.work / f"out-{name}"

    def recipe(self, model: Path, name: str) -> Path:
        """The recipe `neurons` or `ablation` for a model, written where it is not yet."""
        folder = self.work / "recipes" / f"{model.name}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        text = {"neurons": neurons_recipe, "ablation": ablation_recipe}[name](model, folder)
        (folder / "recipe.yaml").write_text(text)
        return folder / "recipe.yaml"

    def prepare(self, inputs: Sequence[Path], outputs: Sequence[Path]) -> None:
        """No output of an earlier run, nothing left to write back, the inputs warm or cold."""
        for output in outputs:
            shutil.rmtree(output, ignore_errors=True)
        os.sync()
        for path in (file for folder in inputs for file in folder.rglob("*") if file.is_file()):
            warm(path) if self.cache == "warm" else cool(path)


# ------------------------------------------------------------------------------------- recipes


def config(model: Path) -> dict[str, int]:
    return dict(json.loads((model / "config.json").read_text()))


def neurons(model: Path) -> tuple[int, list[int]]:
    """Three neurons of the middle layer: three columns of one down_proj."""
    sizes = config(model)
    last = sizes["intermediate_size"] - 1
    return sizes["num_hidden_layers"] // 2, [17, last // 2, last]


def neurons_recipe(model: Path, folder: Path) -> str:
    layer, columns = neurons(model)
    named = ", ".join(f"L{layer}N{column}" for column in columns)
    return f"schema: 1\nedits:\n  - {{op: neurons, neurons: [{named}], factor: 0.0}}\n"


def ablation_recipe(model: Path, folder: Path) -> str:
    """One direction taken out of every o_proj and down_proj, but not of the embedding."""
    sizes = config(model)
    write_sae(folder / "sae", sizes["hidden_size"])
    layers = f'"0-{sizes["num_hidden_layers"] - 1}"' if sizes["num_hidden_layers"] > 1 else "[0]"
    return (
        "schema: 1\nedits:\n  - {op: sae, sae: sae/, features: [0], patch: orthogonalize, "
        f"layers: {layers}}}\n"
    )


def write_sae(folder: Path, width: int) -> None:
    """A SAELens folder of one feature in a random direction."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    row = array.array("f", (rng.gauss(0, 1) for _ in range(width))).tobytes()
    entry = {"dtype": "F32", "shape": [1, width], "data_offsets": [0, len(row)]}
    raw = json.dumps({"W_dec": entry}).encode()
    (folder / "sae_weights.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + row)
    fields = {"d_in": width, "d_sae": 1, "metadata": {"hook_name": "blocks.0.hook_resid_post"}}
    (folder / "cfg.json").write_text(json.dumps(fields))


# ---------------------------------------------------------------------------------------- rows


def measure_copy(bench: Bench, model: Path) -> Run:
    target = bench.output("cp")
    bench.prepare([model], [target])
    return run(["sh", "-c", 'cp -r "$1" "$2" && sync -f "$2"', "sh", str(model), str(target)])


def measure_apply(bench: Bench, model: Path, recipe: str, *, sample: bool = False) -> Run:
    target, written = bench.output("apply"), bench.recipe(model, recipe)
    bench.prepare([model], [target])
    command = surgery("apply", written, "--model", model, "--output", target)
    return run(command, sample=sample)


def measure_transformers(bench: Bench, model: Path) -> Run:
    target = bench.output("transformers")
    bench.prepare([model], [target])
    layer, columns = neurons(model)
    arguments = [str(model), str(target), str(layer), *map(str, columns)]
    return run([sys.executable, "-c", LOAD_EDIT_SAVE, *arguments])


def row_neurons(bench: Bench) -> list[Row]:
    model = bench.model("llama-1.1b")
    runs = interleave(
        bench.runs,
        {
            "apply": lambda: measure_apply(bench, model, "neurons"),
            "cp -r, sync -f": lambda: measure_copy(bench, model),
        },
    )
    figure = "`surgery apply`, three neurons, against `cp -r` + `sync -f`"
    return [compare(figure, 1.5, runs, "apply", "cp -r, sync -f")]


def row_transformers(bench: Bench) -> list[Row]:
    model = bench.model("llama-1.1b")
    runs = interleave(
        bench.runs,
        {
            "apply": lambda: measure_apply(bench, model, "neurons"),
            "transformers": lambda: measure_transformers(bench, model),
        },
    )
    figure = "the same against transformers load-edit-save (which does not sync)"
    return [compare(figure, 0.5, runs, "apply", "transformers")]


def row_ablation(bench: Bench) -> list[Row]:
    model = bench.model("llama-1.1b")
    runs = interleave(
        bench.runs,
        {
            "apply": lambda: measure_apply(bench, model, "ablation"),
            "cp -r, sync -f": lambda: measure_copy(bench, model),
        },
    )
    figure = "directional ablation of every `o_proj` and `down_proj` against `cp -r` + `sync -f`"
    return [compare(figure, 4, runs, "apply", "cp -r, sync -f")]


def row_memory(bench: Bench) -> list[Row]:
    """Both recipes at both sizes: the limit is on each, the growth between the sizes."""
    rows = []
    for recipe in ("neurons", "ablation"):
        small, large = (
            measure_apply(bench, bench.model(size), recipe, sample=True).peak / MIB
            for size in ("llama-1.1b", "llama-4.4b")
        )
        growth = large / small - 1
        rows.append(
            Row(
                f"peak memory of `apply`, {recipe}, at 1.1 B and at 4.4 B",
                "≤ 300 MiB, growth ≤ 10%",
                f"{small:.0f} and {large:.0f} MiB, {growth:+.1%}",
                max(small, large) <= 300 and growth <= 0.1,
                "one run each",
            )
        )
    return rows


def row_huge(bench: Bench) -> list[Row]:
    model = bench.model("llama-2gb-tensor")
    figure = "peak memory with one 2 GB tensor edited"
    rows = []
    for recipe in ("neurons", "ablation"):
        done = measure_apply(bench, model, recipe, sample=True)
        peak = done.peak / MIB
        detail = f"one run of {done.seconds:.1f} s"
        rows.append(Row(f"{figure}, {recipe}", "≤ 512 MiB", f"{peak:.0f} MiB", peak <= 512, detail))
    return rows


def row_verify(bench: Bench) -> list[Row]:
    measure_apply(bench, bench.model("llama-1.1b"), "neurons")
    edited = bench.output("apply")
    files = [str(file) for file in sorted(edited.rglob("*")) if file.is_file()]

    def measure(command: list[str]) -> Run:
        bench.prepare([edited], [])
        return run(command)

    runs = interleave(
        bench.runs,
        {
            "verify": lambda: measure(surgery("verify", edited)),
            "sha256sum": lambda: measure(["sha256sum", *files]),
        },
    )
    figure = "`surgery verify` against `sha256sum` of the folder"
    return [compare(figure, 1.1, runs, "verify", "sha256sum")]


def row_plan(bench: Bench) -> list[Row]:
    model = bench.model("llama-4.4b")
    recipe = bench.recipe(model, "neurons")
    command = surgery("plan", recipe, "--model", model)
    bench.prepare([model], [])
    seconds = [run(command).seconds for _ in range(bench.runs)]
    read, mapped = weight_bytes_read(command, bench.work)
    quick = statistics.median(seconds) <= 1
    return [
        Row(
            "`surgery plan` on 4.4 B",
            "≤ 1 s, no weight byte read",
            f"{statistics.median(seconds):.2f} s, {read} bytes read, {mapped} files mapped",
            quick and read == 0 and mapped == 0,
            f"{spread(seconds)}; bytes past the headers, by strace",
        )
    ]


def row_delta(bench: Bench) -> list[Row]:
    if not (offers("revert", "--delta") and offers("apply", "--delta")):
        return [Row("delta of a three-neuron edit", "≤ 64 kB", "not there yet", None, "")]
    model = bench.model("llama-1.1b")
    recipe, delta = bench.recipe(model, "neurons"), bench.work / "edit.safetensors"
    edited, back, again = (bench.output(name) for name in ("apply", "revert", "again"))
    delta.unlink(missing_ok=True)
    bench.prepare([], [edited, back, again])
    run(surgery("apply", recipe, "--model", model, "--output", edited, "--delta", delta))
    run(surgery("revert", edited, "--delta", delta, "--output", back))
    run(surgery("apply", delta, "--model", model, "--output", again))
    size = delta.stat().st_size
    reverted, repeated = differing(model, back), differing(edited, again)
    weights = [name for name in repeated if name != RECEIPT]
    return [
        Row("delta of a three-neuron edit", "≤ 64 kB", f"{size:,} bytes", size <= 64_000, ""),
        Row(
            "revert and re-apply",
            "bit-identical",
            f"{len(reverted)} and {len(repeated)} files differ",
            not reverted and not weights,
            ", ".join([*reverted, *repeated]) or "every file compared byte by byte",
        ),
    ]


def differing(one: Path, other: Path) -> list[str]:
    """Files that only one folder has, or that differ in a byte."""
    names = {
        file.relative_to(folder).as_posix()
        for folder in (one, other)
        for file in folder.rglob("*")
        if file.is_file()
    }
    return sorted(name for name in names if not same_bytes(one / name, other / name))


def same_bytes(one: Path, other: Path) -> bool:
    done = subprocess.run(["cmp", "-s", str(one), str(other)], check=False)  # noqa: S607
    return done.returncode == 0


ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    "neurons": row_neurons,
    "transformers": row_transformers,
    "ablation": row_ablation,
    "memory": row_memory,
    "huge": row_huge,
    "verify": row_verify,
    "plan": row_plan,
    "delta": row_delta,
}


# ---------------------------------------------------------------------------------------- main


def clear(work: Path) -> None:
    for output in work.glob("out-*"):
        shutil.rmtree(output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and outputs")
    parser.add_argument("--model", type=Path, help="in place of llama-1.1b")
    parser.add_argument("--large", type=Path, help="in place of llama-4.4b")
    parser.add_argument("--huge", type=Path, help="in place of llama-2gb-tensor")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cache", choices=["warm", "cold"], default="warm")
    parser.add_argument(
        "--only", choices=ROWS, action="append", metavar="ROW", help=", ".join(ROWS)
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    given = {
        "llama-1.1b": options.model,
        "llama-4.4b": options.large,
        "llama-2gb-tensor": options.huge,
    }
    models = {size: path.resolve() for size, path in given.items() if path}
    bench = Bench(options.work.resolve(), options.runs, options.cache, models)
    print(f"`{' '.join(['bench_checkpoint.py', *sys.argv[1:]])}`")
    print(f"{os.cpu_count()} cores, {options.runs} runs in turn, {options.cache} cache, medians\n")
    return table(bench, ROWS, options.only or ROWS, lambda: clear(options.work))


if __name__ == "__main__":
    sys.exit(main())
