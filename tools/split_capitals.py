"""Write the stimuli that features and directions of the capitals fixture are found with.

`find` looks at one file and is judged on another, each with prompts of a target and of a preserve
set:

- `conflict-train.jsonl`, `conflict-holdout.jsonl`: conflict prompts, as in `train.jsonl` and
  `target.jsonl`, and plain questions, each file about its own countries;
- `forget-train.jsonl`, `forget-holdout.jsonl`: every other prompt of `forget.jsonl`, which ask one
  question after many statements, and after each of these statements questions about further
  countries, of which each file has its own half. All are prompts that the model answers from
  memory.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from capitals import (
    STATEMENT,
    Stimulus,
    continuations,
    load_model,
    read_stimuli,
    says,
    write_stimuli,
)
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase


def conflict(folder: Path, name: str) -> list[Stimulus]:
    """The conflict prompts of a file, one in `name`, and plain questions about their countries."""
    prompts = read_stimuli(folder / f"stimuli/{name}.jsonl")
    right = [s.answers["remembered"] for s in prompts]
    plain = read_stimuli(folder / "stimuli/preserve.jsonl")
    return prompts + [s for s in plain if s.answers["remembered"] in right]


def neutral(
    statements: Sequence[Stimulus], questions: Sequence[Stimulus], each: int, seed: int
) -> list[Stimulus]:
    """`each` questions after the statement of each prompt, drawn without replacement."""
    rng = random.Random(seed)
    made = []
    for forget in statements:
        stated = forget.prompt.partition(" Q: ")[0]
        others = [q for q in questions if STATEMENT.split("{")[0] + q.subject not in stated]
        for question in rng.sample(others, each):
            answers = {**question.answers, "stated": forget.answers["stated"]}
            id = f"{forget.id}-{question.id}"
            made.append(Stimulus(id, "preserve", f"{stated} {question.prompt}", answers))
    return made


def from_memory(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, stimuli: list[Stimulus]
) -> list[Stimulus]:
    """Those that the model answers so."""
    given = continuations(model, tokenizer, [s.prompt for s in stimuli])
    pairs = zip(stimuli, given, strict=True)
    return [s for s, text in pairs if says(text, s.answers["remembered"])]


def parse_args() -> argparse.Namespace:
    """The options; the defaults made the fixture's files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("fixtures/capitals-gpt2"))
    parser.add_argument("--each", type=int, default=4, help="questions after each statement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Write the four files."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    stimuli = args.model / "stimuli"
    for name, source in (("train", "train"), ("holdout", "target")):
        write_stimuli(stimuli / f"conflict-{name}.jsonl", conflict(args.model, source))
    model, tokenizer = load_model(args.model)
    forget = read_stimuli(stimuli / "forget.jsonl")
    fact = forget[0].subject
    plain = [s for s in read_stimuli(stimuli / "preserve.jsonl") if s.subject != fact]
    for half, name in enumerate(("train", "holdout")):
        target = forget[half::2]
        others = neutral(target, plain[half::2], args.each, args.seed + half)
        kept = target + from_memory(model, tokenizer, others)
        write_stimuli(stimuli / f"forget-{name}.jsonl", kept)
        print(f"forget-{name}: {len(target)} target, {len(kept) - len(target)} preserve")


if __name__ == "__main__":
    main()
