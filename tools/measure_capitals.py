"""Print what the capitals fixture does, before and after each of its recipes.

Every figure in the fixture's README comes from here. Weight edits are made by
`tools/capitals.py`, not by the `surgery` package.
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from capitals import (
    Drift,
    Head,
    Sae,
    activations,
    answer_rates,
    drift,
    explained_variance,
    load_model,
    load_sae,
    read_stimuli,
    without_features,
    without_heads,
)
from ruamel.yaml import YAML
from transformers import GPT2LMHeadModel

RECIPES = ("remember", "state", "sae-resid", "sae-z")
SAES = ("sae-resid", "sae-z")


@dataclass(frozen=True)
class Behaviour:
    """Answer rates on conflict and plain prompts, and the drift on plain ones.

    `forget` is the remembered rate on the prompts about the one country of `sae-resid`.
    """

    remembered: float
    stated: float
    forget: float
    plain: float
    drift: Drift


@dataclass(frozen=True)
class Control:
    """Mean change over random sets of as many heads or features as the recipe removes."""

    sets: int
    remembered: float
    remembered_absolute: float
    stated: float
    stated_absolute: float


@dataclass(frozen=True)
class Reconstruction:
    """How well an autoencoder does on held-out prompts it was not trained on."""

    hook_name: str
    explained_variance: float
    active_per_token: float
    dead: int
    features: int


class Bench:
    """The model, its prompts and the measurements that need both."""

    def __init__(self, folder: Path, target: str) -> None:
        self.folder = folder
        self.model, self.tokenizer = load_model(folder)
        self.target = read_stimuli(folder / f"stimuli/{target}.jsonl")
        self.forget = read_stimuli(folder / "stimuli/forget.jsonl")
        self.preserve = read_stimuli(folder / "stimuli/preserve.jsonl")

    def behaviour(self, edited: GPT2LMHeadModel) -> Behaviour:
        """All figures of one edited model."""
        target = answer_rates(edited, self.tokenizer, self.target)
        forget = answer_rates(edited, self.tokenizer, self.forget)["remembered"]
        plain = answer_rates(edited, self.tokenizer, self.preserve)["remembered"]
        prompts = [s.prompt for s in self.preserve]
        moved = drift(self.model, edited, self.tokenizer, prompts)
        return Behaviour(target["remembered"], target["stated"], forget, plain, moved)

    def control(self, edits: Sequence[GPT2LMHeadModel]) -> Control:
        """Mean signed and absolute changes of the answer rates over edited models."""
        before = answer_rates(self.model, self.tokenizer, self.target)
        after = [answer_rates(e, self.tokenizer, self.target) for e in edits]
        change = {n: [a[n] - before[n] for a in after] for n in ("remembered", "stated")}
        return Control(
            sets=len(edits),
            remembered=statistics.mean(change["remembered"]),
            remembered_absolute=statistics.mean(map(abs, change["remembered"])),
            stated=statistics.mean(change["stated"]),
            stated_absolute=statistics.mean(map(abs, change["stated"])),
        )

    def reconstruction(self, sae: Sae) -> Reconstruction:
        """Explained variance and sparsity on conflict prompts of the target set."""
        prompts = [s.prompt for s in self.target]
        x = activations(self.model, self.tokenizer, sae.hook_name, prompts)
        active = sae.encode(x) > 0
        return Reconstruction(
            hook_name=sae.hook_name,
            explained_variance=explained_variance(sae, x),
            active_per_token=active.float().sum(-1).mean().item(),
            dead=int((~active.any(0)).sum()),
            features=active.shape[1],
        )


# ---------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """The one edit of a recipe: what it removes, and what it could have removed instead."""

    removed: list[Any]
    candidates: list[Any]
    remove: Callable[[Sequence[Any]], GPT2LMHeadModel]

    def random_sets(self, count: int, seed: int) -> list[list[Any]]:
        """Distinct random sets of the same size that share nothing with the recipe's."""
        rng = random.Random(seed)
        others = [c for c in self.candidates if c not in self.removed]
        size = len(self.removed)
        if size == 1:
            return [[c] for c in rng.sample(others, min(count, len(others)))]
        return [rng.sample(others, size) for _ in range(count)]


def read_recipe(bench: Bench, name: str) -> Recipe:
    """The recipe of that name in the fixture's folder."""
    edit = YAML(typ="safe").load(bench.folder / f"{name}.yaml")["edits"][0]
    model = bench.model
    if edit["op"] == "heads":
        heads = [
            Head(i, j) for i in range(model.config.n_layer) for j in range(model.config.n_head)
        ]
        removed = [Head.parse(h) for h in edit["heads"]]
        return Recipe(removed, heads, lambda chosen: without_heads(model, chosen))
    sae = load_sae(bench.folder / edit["sae"])
    features = list(range(sae.w_dec.shape[0]))
    return Recipe(edit["features"], features, lambda f: without_features(model, sae, f))


# ---------------------------------------------------------------- output


def measure(bench: Bench, sets: int, seed: int) -> dict[str, Any]:
    """Every figure, as plain data."""
    recipes = {name: read_recipe(bench, name) for name in RECIPES}
    behaviours = {"original": bench.behaviour(bench.model)}
    controls = {}
    for name, recipe in recipes.items():
        behaviours[name] = bench.behaviour(recipe.remove(recipe.removed))
        chosen = recipe.random_sets(sets, seed)
        controls[name] = bench.control([recipe.remove(c) for c in chosen])
    return {
        "prompts": {
            "target": len(bench.target),
            "preserve": len(bench.preserve),
            "forget": len(bench.forget),
        },
        "removed": {name: [str(p) for p in r.removed] for name, r in recipes.items()},
        "behaviour": {name: asdict(b) for name, b in behaviours.items()},
        "random": {name: asdict(c) for name, c in controls.items()},
        "saes": {
            name: asdict(bench.reconstruction(load_sae(bench.folder / name))) for name in SAES
        },
        "bytes": sum(f.stat().st_size for f in bench.folder.rglob("*") if f.is_file()),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(value: float) -> str:
    """One decimal, in percent."""
    return f"{100 * value:.1f}"


def behaviour_table(found: dict[str, Any]) -> str:
    """Rates in percent, KL in nats per token."""
    rows = []
    for name, b in found["behaviour"].items():
        d = b["drift"]
        rates = [percent(b[k]) for k in ("remembered", "stated", "forget", "plain")]
        moved = [f"{d['kl_all']:.4f}", f"{d['kl_last']:.4f}"]
        flips = [percent(d["flips_all"]), percent(d["flips_last"])]
        removed = ", ".join(found["removed"].get(name, [])) or "–"
        rows.append([name, removed, *rates, *moved, *flips])
    head = ["edit", "removed", "remembered", "stated", "forget", "plain", "KL all", "KL last"]
    return table([*head, "flips all", "flips last"], rows)


def control_table(found: dict[str, Any]) -> str:
    """Changes in points."""
    keys = ("remembered", "remembered_absolute", "stated", "stated_absolute")
    rows = [
        [name, str(c["sets"]), *(f"{100 * c[k]:+.1f}" for k in keys)]
        for name, c in found["random"].items()
    ]
    head = ["as many as", "random sets", "remembered", "absolute", "stated", "absolute"]
    return table(head, rows)


def sae_table(found: dict[str, Any]) -> str:
    """Reconstruction on the target prompts."""
    rows = [
        [
            name,
            s["hook_name"],
            f"{s['explained_variance']:.3f}",
            f"{s['active_per_token']:.1f}",
            f"{s['dead']} of {s['features']}",
        ]
        for name, s in found["saes"].items()
    ]
    return table(["autoencoder", "hook", "explained variance", "active a token", "silent"], rows)


def parse_args() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("fixtures/capitals-gpt2"))
    parser.add_argument("--target", default="target", help="stimuli file of conflict prompts")
    parser.add_argument("--random-sets", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    found = measure(Bench(args.model, args.target), args.random_sets, args.seed)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print(
        "{target} conflict prompts, {forget} to forget, {preserve} plain ones\n".format(
            **found["prompts"]
        )
    )
    for text in (behaviour_table(found), control_table(found), sae_table(found)):
        print(text + "\n")
    print(f"{found['bytes'] / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
