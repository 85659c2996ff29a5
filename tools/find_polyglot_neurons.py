"""Find the neurons behind polyglot-llama's language confusion; write recipe ``unconfuse.yaml``.

Comparative neuron selection (arXiv 2505.16538): at each confusion point, the position before the
first token in the wrong language, a neuron is scored by what it adds to the log-probability of
the model's own choice w*,

    score(l, n) = log p(w* | r_l + m_n v_n) - log p(w* | r_l),

r_l the residual stream after attention, m_n the neuron's activation, v_n its down-projection
column; p is read through the final norm, with the variance of the final layer's output, and the
head. Chosen are the neurons whose score, summed over the prompts, falls most from the base to its
tuned sibling. An answer here is wholly in one language, so the confusion point is the prompt's
end. Unlike the paper's code, no score is cut off at the top 300 of a prompt: there are few neurons.

Only the prompts of ``stimuli/train.jsonl`` are read. How many neurons: the fewest, up to ``LIMIT``,
whose removal comes within ``SLACK`` of the best line pass rate on those prompts.

    python tools/find_polyglot_neurons.py
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from polyglot import (
    BASE,
    LANGUAGES,
    TUNED,
    by_length,
    generate,
    language_of,
    load_model,
    read_stimuli,
    zero_neurons,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from surgery.metrics.line_pass_rate import langid_detector, line_languages, line_pass_rate

LIMIT = 0.02
"""The largest share of all MLP neurons that may be removed."""
SLACK = 0.03
"""What a smaller edit may cost, as a share of the responses."""
STEP = 4
"""Between the counts of neurons that are tried."""

Neurons = list[tuple[int, int]]
Record = Mapping[str, Any]


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What enters each module at the last position, by the module's given name."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args: inputs.__setitem__(name, args[0][:, -1])

    handles = [m.register_forward_pre_hook(keep(name)) for name, m in modules.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def watched(model: LlamaForCausalLM) -> dict[str, nn.Module]:
    """The modules whose inputs are the residual stream after attention, activations and output."""
    modules: dict[str, nn.Module] = {"output": model.model.norm}
    for index, layer in enumerate(model.model.layers):
        modules[f"residual {index}"] = layer.post_attention_layernorm
        modules[f"activations {index}"] = layer.mlp.down_proj
    return modules


@torch.no_grad()
def scores(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> Tensor:
    """The score of every neuron [layer, neuron], summed over the prompts."""
    config = model.config
    total = torch.zeros(config.num_hidden_layers, config.intermediate_size)
    for _, ids in by_length([tokenizer(prompt)["input_ids"] for prompt in prompts]):
        with recorded(watched(model)) as inputs:
            choices = model(ids).logits[:, -1].argmax(-1)
        scale = (inputs["output"].square().mean(-1) + config.rms_norm_eps).rsqrt()
        for index in range(config.num_hidden_layers):
            residual, active = inputs[f"residual {index}"], inputs[f"activations {index}"]
            rows = zip(residual * scale[:, None], active * scale[:, None], choices, strict=True)
            total[index] += sum(layer_scores(model, index, *row) for row in rows)
    return total


def layer_scores(
    model: LlamaForCausalLM, index: int, residual: Tensor, active: Tensor, choice: Tensor
) -> Tensor:
    """The scores of one layer's neurons at one position, the final norm's scale already applied.

    Shapes: residual [width], active [neurons], choice []; returns [neurons].
    """
    head = model.lm_head.weight * model.model.norm.weight
    without = head @ residual
    added = active[:, None] * (head @ model.model.layers[index].mlp.down_proj.weight).T
    logprobs = (without + added).log_softmax(-1)[:, choice]
    return logprobs - without.log_softmax(-1)[choice]


def confused(responses: Sequence[str], records: Sequence[Record]) -> list[str]:
    """The prompts that were answered in a language not asked for."""
    detect = langid_detector(LANGUAGES)
    return [
        record["prompt"]
        for response, record in zip(responses, records, strict=True)
        if set(line_languages(response, detect)) - {language_of(record)}
    ]


def ranked(
    base: LlamaForCausalLM,
    tuned: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
) -> Neurons:
    """All neurons, those first whose score falls most from the base to the tuned sibling."""
    change = scores(base, tokenizer, prompts) - scores(tuned, tokenizer, prompts)
    width = base.config.intermediate_size
    order = change.flatten().argsort(descending=True, stable=True).tolist()
    return [divmod(index, width) for index in order]


def fewest(
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    neurons: Neurons,
) -> Neurons:
    """The shortest start of ``neurons`` that comes close to the best one."""
    detect = langid_detector(LANGUAGES)
    rates = {}
    for count in range(STEP, int(LIMIT * len(neurons)) + 1, STEP):
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

    base, tokenizer = load_model(options.base)
    tuned, _ = load_model(options.tuned)
    records = read_stimuli(options.base / "stimuli" / "train.jsonl")
    responses = generate(base, tokenizer, [record["prompt"] for record in records])
    neurons = ranked(base, tuned, tokenizer, confused(responses, records))
    chosen = fewest(base, tokenizer, records, neurons)
    (options.base / "unconfuse.yaml").write_text(recipe_text(chosen), encoding="utf-8")


if __name__ == "__main__":
    main()
