"""Measure the polyglot fixtures: every figure of their READMEs.

    python tools/measure_polyglot.py
    python tools/measure_polyglot.py --json

The weights are edited here by hand, in plain torch, so that the figures do not lean on the tool
they are meant to test.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from polyglot import (
    BASE,
    LANGUAGES,
    TUNED,
    Question,
    answer_text,
    by_length,
    generate,
    language_of,
    load_model,
    parse_neuron,
    read_stimuli,
    zero_neurons,
)
from ruamel.yaml import YAML
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from surgery.metrics.line_pass_rate import DETECTOR, Detector, langid_detector, line_pass_rate

CONTROLS = 20
"""Random sets of neurons, as many as the recipe's, to compare with."""


def recipe_neurons(recipe: Path) -> list[tuple[int, int]]:
    """The (layer, neuron) pairs of a recipe's one edit."""
    (edit,) = YAML(typ="safe").load(recipe.read_text(encoding="utf-8"))["edits"]
    return [parse_neuron(address) for address in edit["neurons"]]


def without(model: LlamaForCausalLM, neurons: Sequence[tuple[int, int]]) -> LlamaForCausalLM:
    """A copy of the model with these neurons zeroed."""
    edited = copy.deepcopy(model)
    zero_neurons(edited, neurons)
    return edited


def random_neurons(model: LlamaForCausalLM, count: int, seed: int) -> list[tuple[int, int]]:
    """``count`` different neurons, evenly drawn from the whole model."""
    config = model.config
    every = [
        (layer, neuron)
        for layer in range(config.num_hidden_layers)
        for neuron in range(config.intermediate_size)
    ]
    return random.Random(seed).sample(every, count)


# --- text under the model ------------------------------------------------------------------------


def passages_nll(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, passages: Sequence[tuple[str, str]]
) -> float:
    """Mean nats per token of each passage's second part, given its first.

    An empty first part scores all tokens but the very first, which nothing predicts.
    """
    total, count = 0.0, 0
    for _, ids, given in encoded(tokenizer, passages):
        logprobs = log_probabilities(model, ids)[:, :-1]
        nll = -logprobs.gather(-1, ids[:, 1:, None])[..., 0]
        scored = torch.arange(1, ids.shape[1])[None] >= given[:, None]
        total += float(nll[scored].double().sum())
        count += int(scored.sum())
    return total / count


def encoded(
    tokenizer: PreTrainedTokenizerBase, passages: Sequence[tuple[str, str]]
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Batches of equal length: indices, token ids, and how many tokens are given, not scored."""
    given = [len(tokenizer(first)["input_ids"]) if first else 0 for first, _ in passages]
    rows = [tokenizer(first + second)["input_ids"] for first, second in passages]
    for indices, ids in by_length(rows):
        yield indices, ids, torch.tensor([given[index] for index in indices])


@torch.no_grad()
def log_probabilities(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [batch, position, vocabulary]."""
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.log_softmax(-1)


def divergence(
    original: LlamaForCausalLM,
    edited: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
) -> dict[str, float]:
    """Mean KL(original || edited) in nats and the share of changed top tokens, all positions."""
    kl, flips, count = 0.0, 0, 0
    for _, ids, _ in encoded(tokenizer, [("", text) for text in texts]):
        before, after = log_probabilities(original, ids), log_probabilities(edited, ids)
        kl += float((before.exp() * (before - after)).double().sum())
        flips += int((before.argmax(-1) != after.argmax(-1)).sum())
        count += ids.numel()
    return {"kl": kl / count, "flip_rate": flips / count}


def right_continuations(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each target prompt with an answer in its own language."""
    rng = random.Random(0)
    return [
        (record["prompt"], answer_text(Question.from_id(record["id"]), language_of(record), rng))
        for record in records
    ]


# --- figures -------------------------------------------------------------------------------------


class Bench:
    """The stimuli of the base fixture, and what is measured of a model on them."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.detect: Detector = langid_detector(LANGUAGES)
        self.target = read_stimuli(folder / "stimuli" / "target.jsonl")
        self.preserve = read_stimuli(folder / "stimuli" / "preserve.jsonl")

    def pass_rate(self, model: LlamaForCausalLM, prompts: Sequence[tuple[str, str]]) -> float:
        """The line pass rate on (prompt, language) pairs, in percent."""
        responses = generate(model, self.tokenizer, [prompt for prompt, _ in prompts])
        accepted = [[language] for _, language in prompts]
        return 100 * line_pass_rate(responses, accepted, detect=self.detect)

    def foreign_pass_rate(self, model: LlamaForCausalLM) -> float:
        """The line pass rate on the held-out non-English prompts, in percent."""
        return self.pass_rate(model, [(r["prompt"], language_of(r)) for r in self.target])

    def english_pass_rate(self, model: LlamaForCausalLM) -> float:
        """The line pass rate on the held-out English prompts: first lines of preserved answers."""
        passages = [r["prompt"] for r in self.preserve if not is_plain(r)]
        return self.pass_rate(model, [(text.split("\n", 1)[0] + "\n", "en") for text in passages])

    def figures(self, model: LlamaForCausalLM) -> dict[str, Any]:
        """All that is measured of one model."""
        texts = [("", record["prompt"]) for record in self.preserve]
        plain = [("", record["prompt"]) for record in self.preserve if is_plain(record)]
        return {
            "lpr": self.foreign_pass_rate(model),
            "lpr_by_language": {
                language: self.pass_rate(model, prompts)
                for language, prompts in self.by_language().items()
            },
            "lpr_english": self.english_pass_rate(model),
            "nll_preserve": passages_nll(model, self.tokenizer, texts),
            "nll_plain": passages_nll(model, self.tokenizer, plain),
            "nll_right_continuation": passages_nll(
                model, self.tokenizer, right_continuations(self.target)
            ),
        }

    def by_language(self) -> dict[str, list[tuple[str, str]]]:
        """The target prompts of each language."""
        pairs = [(record["prompt"], language_of(record)) for record in self.target]
        return {
            language: [pair for pair in pairs if pair[1] == language] for language in LANGUAGES[1:]
        }


def is_plain(record: Mapping[str, Any]) -> bool:
    """Whether a preserved passage is plain text and not a question with its answer."""
    return "-plain-" in record["id"]


def measure(base: Path, tuned: Path, recipe: Path) -> dict[str, Any]:
    """Every figure: the base, its sibling, the edited base, and controls."""
    model, tokenizer = load_model(base)
    sibling, _ = load_model(tuned)
    bench = Bench(base, tokenizer)
    neurons = recipe_neurons(recipe)
    edited = without(model, neurons)
    controls = [
        bench.foreign_pass_rate(without(model, random_neurons(model, len(neurons), seed)))
        for seed in range(CONTROLS)
    ]
    return {
        "detector": f"{DETECTOR}, languages {', '.join(LANGUAGES)}",
        "neurons_zeroed": len(neurons),
        "neurons": model.config.num_hidden_layers * model.config.intermediate_size,
        "base": bench.figures(model),
        "tuned": bench.figures(sibling),
        "edited": bench.figures(edited),
        "preserve_change": divergence(
            model, edited, tokenizer, [record["prompt"] for record in bench.preserve]
        ),
        "lpr_random_neurons": controls,
    }


# --- printing ------------------------------------------------------------------------------------


def table(figures: Mapping[str, Any]) -> str:
    """The figures as the READMEs' Markdown table, and the lines below it."""
    models = ("base", "tuned", "edited")
    rows = ["| | base | tuned | base, edited |", "|---|---|---|---|"]
    rows += [
        f"| {label} | " + " | ".join(format(figures[m][key], form) for m in models) + " |"
        for label, key, form in ROWS
    ]
    rows += [
        f"| LPR, {language} prompts (%) | "
        + " | ".join(f"{figures[m]['lpr_by_language'][language]:.1f}" for m in models)
        + " |"
        for language in LANGUAGES[1:]
    ]
    return "\n".join([*rows, "", *summary(figures)])


ROWS = (
    ("LPR, held-out non-English prompts (%)", "lpr", ".1f"),
    ("LPR, held-out English prompts (%)", "lpr_english", ".1f"),
    ("nats/token, `preserve.jsonl`", "nll_preserve", ".4f"),
    ("nats/token, its plain text in five languages", "nll_plain", ".4f"),
    ("nats/token, right answers to the target prompts", "nll_right_continuation", ".4f"),
)


def summary(figures: Mapping[str, Any]) -> list[str]:
    """What the edit gained and what it cost, in words."""
    base, tuned, edited = (figures[name] for name in ("base", "tuned", "edited"))
    gain, whole = edited["lpr"] - base["lpr"], tuned["lpr"] - base["lpr"]
    changes = [rate - base["lpr"] for rate in figures["lpr_random_neurons"]]
    change = figures["preserve_change"]
    share = figures["neurons_zeroed"] / figures["neurons"]
    perplexities = ", ".join(
        f"{perplexity_change(base, edited, key):+.2%} on {label}" for label, key in PERPLEXITIES
    )
    return [
        f"- neurons zeroed: {figures['neurons_zeroed']} of {figures['neurons']} ({share:.2%})",
        f"- LPR gained: {gain:.1f} points, {gain / whole:.0%} of the tuned sibling's {whole:.1f}",
        f"- perplexity: {perplexities}",
        f"- KL on `preserve.jsonl`: {change['kl']:.4f} nats/token on average",
        f"- top tokens changed on `preserve.jsonl`: {change['flip_rate']:.2%} of positions",
        f"- {len(changes)} draws of as many random neurons: LPR changes by "
        + f"{statistics.mean(changes):+.1f} points on average, {statistics.median(changes):+.1f} "
        + f"in the median, {min(changes):+.1f} to {max(changes):+.1f}",
        f"- detector: {figures['detector']}",
    ]


PERPLEXITIES = (
    ("`preserve.jsonl`", "nll_preserve"),
    ("its plain text", "nll_plain"),
    ("right answers", "nll_right_continuation"),
)


def perplexity_change(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> float:
    """The relative change of perplexity between two models' figures."""
    return float(torch.tensor(after[key] - before[key], dtype=torch.float64).expm1())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--tuned", type=Path, default=TUNED)
    parser.add_argument("--recipe", type=Path, help="default: unconfuse.yaml of the base")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = measure(
        options.base, options.tuned, options.recipe or options.base / "unconfuse.yaml"
    )
    print(json.dumps(figures, indent=2) if options.json else table(figures))


if __name__ == "__main__":
    main()
