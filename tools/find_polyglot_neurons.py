"""Find the neurons behind polyglot-llama's language confusion; write recipe ``unconfuse.yaml``.

The order is that of ``surgery find neurons`` with the tuned sibling: see ``surgery.find.neurons``.
Only the prompts of ``stimuli/train.jsonl`` are read. How many neurons: the fewest, up to the share
that the finder allows, whose removal comes within ``SLACK`` of the best line pass rate on those
prompts.

    python tools/find_polyglot_neurons.py
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from polyglot import (
    BASE,
    LANGUAGES,
    TUNED,
    generate,
    language_of,
    load_model,
    read_stimuli,
    zero_neurons,
)
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.find import Goal, Lab
from surgery.find.journal import Journal
from surgery.find.neurons import Neurons as Finder
from surgery.metrics import make_metric
from surgery.metrics.line_pass_rate import langid_detector, line_pass_rate
from surgery.runtimes.interface import ModelRef
from surgery.runtimes.pytorch import TorchRuntime
from surgery.stimuli.prompts import Tokenizer, load_stimuli

SLACK = 0.03
"""What a smaller edit may cost, as a share of the responses."""
STEP = 4
"""Between the counts of neurons that are tried."""
ROWS = 256
"""Neurons whose logits are computed at once."""

Neurons = list[tuple[int, int]]
Record = Mapping[str, Any]


def ranked(base: Path, tuned: Path, threads: int, journal: Path) -> Neurons:
    """The neurons that may be removed, the best first."""
    checkpoint, metric = Checkpoint.open(base), f"line_pass_rate:{','.join(LANGUAGES)}"
    lab = Lab(
        checkpoint,
        identify(checkpoint),
        TorchRuntime(ModelRef("torch", base, "causal-lm"), threads),
        Tokenizer(base),
        load_stimuli([base / "stimuli" / "train.jsonl"]),
        Goal(metric, make_metric(metric), 1),
        seed=0,
        budget=ROWS,
        tensors="",
        journal=Journal(journal),
        progress=lambda what, done, of: print(f"{what}: {done} of {of}", file=sys.stderr),
    )
    found = Finder(tuned=tuned).rank(lab)
    places = zip(found.column("layer"), found.column("neuron"), strict=True)
    return [(int(layer), int(neuron)) for layer, neuron in places]


def fewest(
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    neurons: Neurons,
) -> Neurons:
    """The shortest start of ``neurons`` that comes close to the best one."""
    detect = langid_detector(LANGUAGES)
    rates = {}
    for count in range(STEP, len(neurons) + 1, STEP):
        edited = copy.deepcopy(base)
        zero_neurons(edited, neurons[:count])
        responses = generate(edited, tokenizer, [record["prompt"] for record in records])
        accepted = [[language_of(record)] for record in records]
        rates[count] = line_pass_rate(responses, accepted, detect=detect)
        print(f"{count:3d} neurons: LPR {rates[count]:.1%}", file=sys.stderr)
    enough = max(rates.values()) - SLACK
    return neurons[: min(count for count, rate in rates.items() if rate >= enough)]


def recipe_text(neurons: Neurons) -> str:
    """The recipe, six neurons to a line."""
    addresses = [f"L{layer}N{neuron}" for layer, neuron in sorted(neurons)]
    lines = [", ".join(addresses[start : start + 6]) for start in range(0, len(addresses), 6)]
    return HEADER + "\n".join(f"      {line}," for line in lines) + FOOTER


HEADER = """\
# Answers every question in its own language: zeroes the neurons of the confusion with English.
# Written by tools/find_polyglot_neurons.py.
schema: 1
edits:
  - op: neurons
    neurons: [
"""
FOOTER = """
    ]
    factor: 0.0
"""


def main() -> None:
    """Find, and write the recipe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--tuned", type=Path, default=TUNED)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    with tempfile.TemporaryDirectory() as folder:
        neurons = ranked(options.base, options.tuned, options.threads, Path(folder))
    base, tokenizer = load_model(options.base)
    records = read_stimuli(options.base / "stimuli" / "train.jsonl")
    chosen = fewest(base, tokenizer, records, neurons)
    (options.base / "unconfuse.yaml").write_text(recipe_text(chosen), encoding="utf-8")


if __name__ == "__main__":
    main()
