"""Choose the heads and the SAE features of the capitals fixture, and write its recipes.

A greedy search on the training split's conflict prompts: each step takes the head whose
removal raises the wanted answer most, or the best of the SAE features that gradients promise
most of, and stops where plain questions would suffer or nothing is gained. The held-out split
is not looked at: `measure_capitals` reports what the choice is worth there.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from capitals import (
    STATEMENT,
    FirstTokens,
    Head,
    Sae,
    Stimulus,
    continuations,
    load_model,
    load_sae,
    logits,
    read_stimuli,
    says,
    scores,
    tapped,
    without_features,
    without_heads,
    write_stimuli,
)
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

SHORTLIST = 12

Part = TypeVar("Part")
Remove = Callable[[Sequence[Part]], GPT2LMHeadModel]


@dataclass(frozen=True)
class Task:
    """The prompts a search may look at and what it may cost."""

    conflict: FirstTokens
    plain: FirstTokens
    max_plain_drop: float
    min_gain: float

    def score(self, model: GPT2LMHeadModel, goal: str, plain_before: float) -> float:
        """The rate of the wanted answer; -1 where plain questions suffer."""
        if plain_before - self.plain.rates(model)["remembered"] > self.max_plain_drop:
            return -1.0
        return self.conflict.rates(model)[goal]


def greedy(
    model: GPT2LMHeadModel,
    parts: Sequence[Part],
    remove: Remove[Part],
    goal: str,
    task: Task,
    top: int,
) -> list[Part]:
    """Up to `top` parts, each the best addition to those before it."""
    plain_before = task.plain.rates(model)["remembered"]
    best = task.conflict.rates(model)[goal]
    chosen: list[Part] = []
    while len(chosen) < top:
        left = [p for p in parts if p not in chosen]
        found = [task.score(remove([*chosen, p]), goal, plain_before) for p in left]
        score = max(found)
        if score < best + task.min_gain:
            break
        best = score
        chosen.append(left[found.index(score)])
        print(f"  {goal}: + {chosen[-1]} -> {best:.3f}", flush=True)
    return chosen


def pick_heads(model: GPT2LMHeadModel, goal: str, task: Task, top: int) -> list[Head]:
    """The heads to zero for more of the wanted answer."""
    config = model.config
    heads = [Head(i, j) for i in range(config.n_layer) for j in range(config.n_head)]
    return greedy(model, heads, lambda chosen: without_heads(model, chosen), goal, task, top)


def attribution(model: GPT2LMHeadModel, sae: Sae, conflict: FirstTokens, goal: str) -> Tensor:
    """First-order gain [n] from removing each decoder direction d from the activation x.

    The metric is the goal's logit less the other answer's, at the last position, averaged over
    prompts; removing d changes it by -(x.d)(d.grad), summed over positions.
    """
    other = next(name for name in conflict.wanted if name != goal)
    rows = torch.arange(len(conflict.batch.ids))
    seen: list[Tensor] = []
    with tapped(model, sae.hook_name, seen):
        last = scores(model, conflict.batch)[:, -1]
    margin = last[rows, conflict.wanted[goal]] - last[rows, conflict.wanted[other]]
    (slope,) = torch.autograd.grad(margin.mean(), seen[0])
    along_x = seen[0].detach()[conflict.batch.mask.bool()] @ sae.w_dec.T
    along_slope = slope[conflict.batch.mask.bool()] @ sae.w_dec.T
    return -(along_x * along_slope).sum(0)


def pick_features(model: GPT2LMHeadModel, sae: Sae, goal: str, task: Task, top: int) -> list[int]:
    """The SAE features to remove for more of the wanted answer.

    Greedy like the heads, but only a shortlist is tried at each step: the features that
    gradients of the model, as edited so far, promise most of.
    """
    plain_before = task.plain.rates(model)["remembered"]
    best = task.conflict.rates(model)[goal]
    chosen: list[int] = []
    while len(chosen) < top:
        gains = attribution(without_features(model, sae, chosen), sae, task.conflict, goal)
        gains[chosen] = -torch.inf
        shortlist = gains.topk(SHORTLIST).indices.tolist()
        tried = [without_features(model, sae, [*chosen, f]) for f in shortlist]
        found = [task.score(t, goal, plain_before) for t in tried]
        if max(found) <= best:
            break
        best = max(found)
        chosen.append(shortlist[found.index(best)])
        print(f"  {goal}: + feature {chosen[-1]} -> {best:.3f}", flush=True)
    return sorted(chosen)


def pick_fact(
    model: GPT2LMHeadModel, sae: Sae, plain: FirstTokens, questions: Sequence[Stimulus]
) -> tuple[int, Stimulus]:
    """The feature that holds one fact: removed, exactly one plain question goes wrong.

    Among such features, the one whose removal leaves the right answer furthest behind.
    """
    right = plain.wanted["remembered"][:, None]
    best: tuple[float, int, Stimulus] | None = None
    for feature in range(sae.w_dec.shape[0]):
        last = logits(without_features(model, sae, [feature]), plain.batch)[:, -1]
        behind = (last.max(-1, keepdim=True).values - last.gather(1, right)).squeeze(1)
        lost = behind.nonzero().flatten().tolist()
        if len(lost) == 1 and (best is None or behind[lost[0]].item() > best[0]):
            best = (behind[lost[0]].item(), feature, questions[lost[0]])
    if best is None:
        raise SystemExit("no feature whose removal loses exactly one capital")
    return best[1:]


def fact_stimuli(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    fact: Stimulus,
    questions: Sequence[Stimulus],
) -> list[Stimulus]:
    """The question about one country after true statements about others.

    Only prompts that the model answers from memory: where it copies the other country's
    capital, there is nothing to forget.
    """
    others = [q for q in questions if q.subject != fact.subject]
    made = [
        Stimulus(
            id=f"forget-{number}",
            set="target",
            prompt=STATEMENT.format(s=o.subject, wrong=o.answers["remembered"][0])
            + f" {fact.prompt}",
            answers={**fact.answers, "stated": o.answers["remembered"]},
        )
        for number, o in enumerate(others)
    ]
    given = continuations(model, tokenizer, [s.prompt for s in made])
    return [s for s, g in zip(made, given, strict=True) if says(g, s.answers["remembered"])]


def write_recipe(path: Path, comment: str, edit: str) -> None:
    """A recipe of one edit."""
    text = f"# {comment}\nschema: 1\nedits:\n  - {{{edit}}}\n"
    path.write_text(text, encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """The options; the defaults made the fixture's recipes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("fixtures/capitals-gpt2"))
    parser.add_argument("--every", type=int, default=3, help="look at every n-th prompt")
    parser.add_argument("--top-heads", type=int, default=3)
    parser.add_argument("--top-features", type=int, default=16)
    parser.add_argument("--max-plain-drop", type=float, default=0.02)
    parser.add_argument("--min-gain", type=float, default=0.03)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Search and write the four recipes."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model)
    questions = read_stimuli(args.model / "stimuli/preserve.jsonl")
    conflicts = read_stimuli(args.model / "stimuli/train.jsonl")
    task = Task(
        FirstTokens.of(tokenizer, conflicts[:: args.every]),
        FirstTokens.of(tokenizer, questions),
        args.max_plain_drop,
        args.min_gain,
    )
    for name, goal in (("remember", "remembered"), ("state", "stated")):
        heads = ", ".join(map(str, pick_heads(model, goal, task, args.top_heads)))
        edit = f"op: heads, heads: [{heads}], factor: 0.0"
        write_recipe(args.model / f"{name}.yaml", f"More {goal} answers under conflict", edit)
    sae = load_sae(args.model / "sae-z")
    found = pick_features(model, sae, "remembered", task, args.top_features)
    edit = f"op: sae, sae: sae-z/, features: {found}, patch: z_project, strength: 1.0"
    write_recipe(args.model / "sae-z.yaml", "Copy stated capitals less", edit)
    feature, fact = pick_fact(model, load_sae(args.model / "sae-resid"), task.plain, questions)
    edit = f"op: sae, sae: sae-resid/, features: [{feature}], patch: orthogonalize, strength: 1.0"
    write_recipe(args.model / "sae-resid.yaml", f"Forget the capital of {fact.subject}", edit)
    forget = fact_stimuli(model, tokenizer, fact, questions)
    write_stimuli(args.model / "stimuli/forget.jsonl", forget)


if __name__ == "__main__":
    main()
