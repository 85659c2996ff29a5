"""Print how far clean conversions lie from float32 noise, and how far two small defects do.

Every figure in `docs/policy.md` comes from here. Random two-layer models of every family, edited
and converted without any defect, in PyTorch and ONNX Runtime, larger random ones and the trained
fixtures: what a limit must let through.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from corners import VOCAB, Case, Exporter, Here
from differential.mutants import add, scale_epsilons
from models import FAMILIES

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.differential import Pair, make_workload, measure
from surgery.evidence import Evidence
from surgery.export import default_task
from surgery.pipeline import silent
from surgery.policy import BUILT_IN
from surgery.process import Limits
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import load_stimuli

DTYPES = ("float32", "bfloat16")
WIDTHS = (32, 64)
LAYERS, LARGE, LENGTH = 6, 256, 256
_LARGER = {
    "num_hidden_layers": LAYERS,
    "hidden_size": LARGE,
    "intermediate_size": 2 * LARGE,
    "max_position_embeddings": LENGTH,
}
LARGER: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": LAYERS, "n_embd": LARGE, "n_positions": LENGTH},
    "llama": _LARGER,
    "qwen3": {**_LARGER, "head_dim": 64},
    "bert": _LARGER,
}
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
BIASES = (0.5, 1.0, 1.5, 2.0, 3.0)
"""Of every element alike, in units of the noise's sigma."""
EPSILON_FACTORS = (1.01, 1.1, 2.0, 10.0, 1e7)


@dataclass(frozen=True)
class Row:
    """One measured number and what it was measured on."""

    quantity: str
    family: str
    dtype: str
    width: int
    value: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epsilon-seeds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="surgery-noise-") as folder:
        bench = Bench(Path(folder))
        rows = list(bench.clean(options.seeds))
        print_clean(rows)
        print_larger(list(bench.larger()))
        print_biases(list(bench.biases()))
        print_epsilons(list(bench.epsilons(options.epsilon_seeds)))


class Bench:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.exporter = Exporter()
        self.here = Here(root / "cache")

    def clean(self, seeds: int) -> Iterator[Row]:
        """The ratios of every family, storage dtype, width and seed, without a defect."""
        for family in FAMILIES:
            for width in WIDTHS:
                for dtype in DTYPES:
                    for seed in range(seeds):
                        evidence = self.measure(self.case(family, seed, dtype, width))
                        yield from rows_of(evidence, family, dtype, width)
                print(f"{family}, width {width}: measured", file=sys.stderr)

    def larger(self) -> Iterator[tuple[str, Evidence]]:
        """Title and evidence of larger random models and of the trained fixtures."""
        for family in FAMILIES:
            case = self.exporter.case(self.root / f"{family}-larger", family, **LARGER[family])
            yield f"{family}, width {LARGE}, {LAYERS} layers", self.measure(case)
        for config in sorted(FIXTURES.glob("*/config.json")):
            model = config.parent
            onnx = self.exporter.export(model, self.root / model.name)
            given = load_stimuli(sorted(model.glob("stimuli/preserve.jsonl")))
            prompts = tuple(replace(stimulus, answers=None) for stimulus in given)
            yield f"fixture {model.name}", self.run({"C_o": Pair(model, onnx)}, prompts)

    def epsilons(self, seeds: int) -> Iterator[tuple[str, float, float]]:
        """Family, factor on every norm's epsilon, and the worst ratio on C_o."""
        import onnx

        for family in FAMILIES:
            for seed in range(seeds):
                case = self.case(family, seed, "float32", WIDTHS[0])
                for factor in EPSILON_FACTORS:
                    model = onnx.load(str(case.onnx))
                    scale_epsilons(model, factor)
                    path = case.onnx.with_name(f"epsilon-{factor}.onnx")
                    onnx.save(model, str(path))
                    row = self.measure(case, path).conversion[0]
                    yield family, factor, max(row.ratio_max, row.ratio_l2, row.ratio_position)

    def biases(self) -> Iterator[tuple[str, float, Evidence]]:
        """Family, a constant added to every element of the output, and the evidence on C_o."""
        import onnx

        for family in FAMILIES:
            case = self.case(family, 0, "float32", WIDTHS[0])
            [clean] = self.measure(case, case.onnx).conversion
            sigma = clean.noise_l2 / np.sqrt(clean.elements)
            for bias in BIASES:
                model = onnx.load(str(case.onnx))
                add(model, np.array(bias * sigma))
                path = case.onnx.with_name(f"bias-{bias}.onnx")
                onnx.save(model, str(path))
                yield family, bias, self.measure(case, path)

    def case(self, family: str, seed: int, dtype: str, width: int) -> Case:
        root = self.root / f"{family}-{seed}-{dtype}-{width}-{len(list(self.root.iterdir()))}"
        size = {"n_embd": width} if family == "gpt2" else {"hidden_size": width}
        return self.exporter.case(root, family, seed, dtype=dtype, **size)

    def measure(self, case: Case, defect: Path | None = None) -> Evidence:
        """Four corners of a clean case, or the original pair with `defect` as its ONNX file."""
        pairs = {"C_o": Pair(case.model, defect or case.onnx)}
        if defect is None:
            pairs["C_e"] = Pair(case.edited, case.edited_onnx)
        return self.run(pairs, stimuli())

    def run(self, pairs: dict[str, Pair], given: tuple[Stimulus, ...]) -> Evidence:
        base = Checkpoint.open(pairs["C_o"].model)
        task = default_task(base.root)
        workload = make_workload(base, identify(base), task, given, BUILT_IN)
        with self.here.installed():
            return measure(pairs, task, workload, Limits(), silent)


def stimuli() -> tuple[Stimulus, ...]:
    """Eight prompts of random tokens for each set."""
    generator = np.random.default_rng(7)
    return tuple(
        Stimulus(f"{name}-{n}", name, input_ids=tuple(generator.integers(3, VOCAB, 4 + n).tolist()))
        for name in ("target", "preserve")
        for n in range(8)
    )


def rows_of(evidence: Evidence, family: str, dtype: str, width: int) -> Iterator[Row]:
    for conversion in evidence.conversion:
        yield Row("C ratio_max", family, dtype, width, conversion.ratio_max)
        yield Row("C ratio_l2", family, dtype, width, conversion.ratio_l2)
        yield Row("C ratio_position", family, dtype, width, conversion.ratio_position)
    for shape in evidence.shapes:
        yield Row("C 1 - overlap", family, dtype, width, 1 - shape.overlap)
        yield Row("C sigma_ratio", family, dtype, width, shape.sigma_ratio)
    for interaction in evidence.interaction:
        yield Row("I noise_ratio", family, dtype, width, interaction.noise_ratio)
        yield Row("I ratio", family, dtype, width, interaction.ratio)


def print_clean(rows: list[Row]) -> None:
    print("| quantity | models | n | median | 99% | max |")
    print("|---|---|---:|---:|---:|---:|")
    for quantity in dict.fromkeys(row.quantity for row in rows):
        own = [row for row in rows if row.quantity == quantity]
        print_line(quantity, "all", own)
        for field in ("family", "dtype", "width"):
            for value in dict.fromkeys(getattr(row, field) for row in own):
                print_line(quantity, value, [r for r in own if getattr(r, field) == value])


def print_line(quantity: str, models: Any, rows: list[Row]) -> None:
    values = np.array([row.value for row in rows])
    numbers = (np.median(values), np.quantile(values, 0.99), values.max())
    print(
        f"| {quantity} | {models} | {len(values)} |", " | ".join(f"{n:.3g}" for n in numbers), "|"
    )


def print_larger(found: list[tuple[str, Evidence]]) -> None:
    print("\n| model | C ratio_max | C ratio_l2 | C overlap | C sigma_ratio | I noise_ratio |")
    print("|---|---:|---:|---:|---:|---:|")
    for title, evidence in found:
        worst = max(row.ratio_max for row in evidence.conversion)
        l2 = max(row.ratio_l2 for row in evidence.conversion)
        interaction = max((row.noise_ratio for row in evidence.interaction), default=None)
        shown = "–" if interaction is None else f"{interaction:.3g}"
        overlap = min(row.overlap for row in evidence.shapes)
        sigma = max(row.sigma_ratio for row in evidence.shapes)
        print(f"| {title} | {worst:.3g} | {l2:.3g} | {overlap:.3f} | {sigma:.3g} | {shown} |")


def print_epsilons(found: list[tuple[str, float, float]]) -> None:
    print("\n| epsilon times | " + " | ".join(FAMILIES) + " |")
    print("|---:|" + "---:|" * len(FAMILIES))
    for factor in EPSILON_FACTORS:
        cells = []
        for family in FAMILIES:
            own = [ratio for f, times, ratio in found if (f, times) == (family, factor)]
            cells.append(f"{min(own):.3g} to {max(own):.3g}")
        print(f"| {factor:g} | " + " | ".join(cells) + " |")


def print_biases(found: list[tuple[str, float, Evidence]]) -> None:
    print("\n| family | bias, sigmas | C ratio_max | C ratio_l2 | overlap | sigma_ratio |")
    print("|---|---:|---:|---:|---:|---:|")
    for family, bias, evidence in found:
        [row], [shape] = evidence.conversion, evidence.shapes
        numbers = (row.ratio_max, row.ratio_l2, shape.overlap, shape.sigma_ratio)
        print(f"| {family} | {bias:g} | {' | '.join(f'{n:.3g}' for n in numbers)} |")


if __name__ == "__main__":
    main()
